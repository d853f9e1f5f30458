"""What OpenOOD and its plug-in import, and the lines that install what is missing."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# By the name that is imported: the distribution and the versions that work together (OpenOOD at 3c35632).
PACKAGES = {
    "numpy": ("numpy", "<2"),  # imgaug 0.4.0 uses np.sctypes
    "torch": ("torch", ""),
    "torchvision": ("torchvision", ""),
    "PIL": ("pillow", ""),
    "sklearn": ("scikit-learn", ""),
    "scipy": ("scipy", ""),
    "pandas": ("pandas", "<3"),
    "cv2": (
        "opencv-python",
        "<4.12",
    ),  # the one that imgaug brings, as two write the same folder; later ones need numpy 2
    "imgaug": ("imgaug", ""),
    "diffdist": ("diffdist", ""),
    "faiss": ("faiss-cpu", ""),
    "statsmodels": ("statsmodels", ""),
    "pytorch_ood": ("pytorch-ood", ">=0.4"),  # the plug-in's own: KNN and GEN of tie_combined
    "timm": ("timm", ""),
    "foolbox": ("foolbox", ""),
    "gdown": ("gdown", ""),
    "json5": ("json5", ""),
    "yaml": ("pyyaml", ""),
    "matplotlib": ("matplotlib", ""),
}
OPENOOD = "pip install --no-deps git+https://github.com/Jingkang50/OpenOOD@3c35632"
LIBMR = "pip install cython setuptools && pip install --no-build-isolation libmr"


def check_requirements() -> None:
    """Name everything that OpenOOD and its plug-in need and that cannot be had here, at once, before anything else happens.

    Raises:
        ImportError: With each missing or incompatible package and the lines that install them.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    unfit = [
        name
        for name, (package, bound) in PACKAGES.items()
        if name not in missing and bound and not _fits(package, bound)
    ]
    lines = []
    if missing or unfit:
        lines.append(
            "pip install "
            + " ".join(
                f"'{package}{bound}'"
                for package, bound in (PACKAGES[name] for name in [*missing, *unfit])
            )
        )
    if find_spec("libmr") is None:
        missing.append("libmr")
        lines.append(LIBMR)
    if find_spec("openood") is None:
        missing.append("openood")
        lines.append(f"{OPENOOD}  # or run from the folder of a checkout, or put it on PYTHONPATH")
    if lines:
        found = [
            f"{name} {version(PACKAGES[name][0])} where {name}{PACKAGES[name][1]} is needed"
            for name in unfit
        ]
        what = "; ".join(filter(None, [f"no {', '.join(missing)}" if missing else "", *found]))
        said = f"Expected the packages that OpenOOD and its plug-in import, but got {what}. Install them with"
        raise ImportError("\n    ".join([said, *lines]))


def _fits(package: str, bound: str) -> bool:
    """Whether the installed version keeps a bound, ``<`` or ``>=`` and a version."""
    try:
        found = version(package)
    except (
        PackageNotFoundError
    ):  # under another name (opencv-python-headless, faiss-gpu): its import decides
        return True
    at, limit = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (found, bound))
    return at >= limit if bound.startswith(">=") else at < limit
