"""What OpenOOD and its plug-in import, and the lines that install what is missing."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = {
    "numpy": ("numpy", "<2"),  # imgaug 0.4.0 uses np.sctypes
    "torch": ("torch", ""),
    "torchvision": ("torchvision", ""),
    "PIL": ("pillow", ""),
    "sklearn": ("scikit-learn", ""),
    "scipy": ("scipy", ""),
    "pandas": ("pandas", "<3"),
    # imgaug brings this one, and two of them write the same folder; later ones need numpy 2.
    "cv2": ("opencv-python", "<4.12"),
    "imgaug": ("imgaug", ""),
    "diffdist": ("diffdist", ""),
    "faiss": ("faiss-cpu", ""),
    "statsmodels": ("statsmodels", ""),
    "pytorch_ood": ("pytorch-ood", ">=0.4"),  # for the plug-in itself: tie_combined
    "timm": ("timm", ""),
    "foolbox": ("foolbox", ""),
    "gdown": ("gdown", ""),
    "json5": ("json5", ""),
    "yaml": ("pyyaml", ""),
    "matplotlib": ("matplotlib", ""),
}
"""Distribution and bound of each package, by the name that is imported; these versions work
together with OpenOOD at 3c35632."""
OPENOOD = "pip install --no-deps git+https://github.com/Jingkang50/OpenOOD@3c35632"
LIBMR = "pip install cython setuptools && pip install --no-build-isolation libmr"


def check_requirements() -> None:
    """Name all packages that OpenOOD and its plug-in need and that are missing or unfit, at once.

    Raises:
        ImportError: With each of them and the lines that install them.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    unfit = [name for name in PACKAGES if name not in missing and not _fits(*PACKAGES[name])]
    lines = []
    if missing or unfit:
        needed = ("".join(PACKAGES[name]) for name in (*missing, *unfit))
        lines.append(f"pip install {' '.join(map(repr, needed))}")
    if find_spec("libmr") is None:
        missing.append("libmr")
        lines.append(LIBMR)
    if find_spec("openood") is None:
        missing.append("openood")
        lines.append(f"{OPENOOD}  # or run from the folder of a checkout, or put it on PYTHONPATH")
    if lines:
        found = [f"no {', '.join(missing)}"] if missing else []
        for name in unfit:
            package, bound = PACKAGES[name]
            found.append(f"{name} {version(package)} where {name}{bound} is needed")
        expected = "Expected the packages that OpenOOD and its plug-in import"
        raise ImportError(
            "\n    ".join([f"{expected}, but got {'; '.join(found)}. Install them with", *lines])
        )


def _fits(package: str, bound: str) -> bool:
    """Whether the installed version keeps a bound: none, or ``<`` or ``>=`` and a version."""
    if not bound:
        return True
    try:
        found = version(package)
    except PackageNotFoundError:
        return True  # under another name (opencv-python-headless, faiss-gpu); its import decides
    at, limit = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (found, bound))
    return at >= limit if bound.startswith(">=") else at < limit
