"""What goes with the package for OpenOOD and needs none of it: image lists and configs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tie_ext.openood import configs
from tie_ext.openood.lists import main, write_list

TREE = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Classes 2 and 10 with two images and one per image without a class, and other files."""
    for name in (
        "svhn/train/10/b.png",
        "svhn/train/2/deep/a.JPG",
        "svhn/train/2/c.png",
        "noise/d.jpeg",
        "empty/readme.txt",
        "odd/a b.png",
    ):
        (tmp_path / "data/images_classic" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/images_classic" / name).touch()
    monkeypatch.chdir(tmp_path)
    return Path("data/images_classic")


def test_a_list_has_the_paths_below_data_dir_and_labels_by_folder(data, capsys):
    path = Path("data/benchmark_imglist/svhn/train_svhn.txt")
    main([str(path), str(data / "svhn/train")])
    assert (
        path.read_text()
        == "svhn/train/2/c.png 0\nsvhn/train/2/deep/a.JPG 0\nsvhn/train/10/b.png 1\n"
    )
    assert capsys.readouterr().out == f"3 images in {path}\n"


def test_images_without_classes_are_ood_and_folders_add_up(data):
    assert write_list("list.txt", data / "noise", data / "svhn/train") == 4
    assert Path("list.txt").read_text().startswith("noise/d.jpeg -1\nsvhn/train/2/c.png 0\n")


@pytest.mark.parametrize(
    ("folder", "said"),
    [("nowhere", "below OpenOOD's data_dir"), ("empty", "got none"), ("odd", "without spaces")],
)
def test_what_openood_could_not_read_is_refused(data, folder, said):
    with pytest.raises(SystemExit, match=said):
        main(["list.txt", str(data / folder)])
    with pytest.raises(SystemExit, match="below OpenOOD's data_dir"):
        main(["list.txt", "data"])
    with pytest.raises(SystemExit, match="Expected a list and folders"):
        main(["list.txt"])
    assert not Path("list.txt").exists()


def test_openood_reads_the_list(openood_root, data):
    from openood.datasets.imglist_dataset import ImglistDataset
    from PIL import Image

    for path in (data / "svhn/train").rglob("*.*"):
        Image.new("L", (4, 4)).save(path, "png")
    write_list("list.txt", data / "svhn/train")
    read = ImglistDataset(
        "svhn", "list.txt", str(data), 2, lambda image: image.size, lambda image: 0
    )
    assert [(read[i]["data"], read[i]["label"]) for i in range(3)] == [
        ((4, 4), 0),
        ((4, 4), 0),
        ((4, 4), 1),
    ]


def test_configs_are_those_of_the_checkout():
    assert configs() == TREE / "openood_configs"


def test_configs_are_in_the_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("tie_ext", "openood_configs"):
        shutil.copytree(
            TREE / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, tmp_path / "tree")
    build = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path / "tree", check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from tie_ext.openood import configs; print(configs())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=True,
    )
    found = Path(run.stdout.strip())
    assert found == tmp_path / "installed" / "tie_ext" / "openood_configs"

    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*.yml")}

    assert files(found) == files(TREE / "openood_configs")
    assert len(files(found)) > 10
