"""OpenOOD's lists of images, of folders."""

from pathlib import Path

import pytest
from PIL import Image

from tie_ext.openood.lists import main, write_list

FILES = "svhn/train/10/b.png svhn/train/2/deep/a.JPG svhn/train/2/c.png noise/d.jpeg empty/r.txt"
LIST = "svhn/train/2/c.png 0\nsvhn/train/2/deep/a.JPG 0\nsvhn/train/10/b.png 1\n"


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Classes 2 and 10 with two images and one per image without a class, and other files."""
    for name in (*FILES.split(), "odd/a b.png"):
        path = tmp_path / "data/images_classic" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return Path("data/images_classic")


def test_paths_below_data_dir_and_labels_by_folder(data, capsys):
    path = Path("data/benchmark_imglist/svhn/train_svhn.txt")
    main([str(path), str(data / "svhn/train")])
    assert path.read_text() == LIST
    assert capsys.readouterr().out == f"3 images in {path}\n"
    assert write_list("list.txt", data / "noise", data / "svhn/train") == 4
    assert Path("list.txt").read_text() == "noise/d.jpeg -1\n" + LIST


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["data/images_classic/nowhere"], "below OpenOOD's data_dir"),
        (["data"], "below OpenOOD's data_dir"),
        (["data/images_classic/empty"], "got none"),
        (["data/images_classic/odd"], "without spaces"),
        ([], "Expected a list and folders"),
    ],
)
def test_errors_of_folders_that_openood_cannot_read(data, folders, said):
    with pytest.raises(SystemExit, match=said):
        main(["list.txt", *folders])
    assert not Path("list.txt").exists()


def test_lists_that_openood_reads(openood_root, data):
    from openood.datasets.imglist_dataset import ImglistDataset

    for path in (data / "svhn/train").rglob("*.*"):
        Image.new("L", (4, 4)).save(path, "png")
    write_list("list.txt", data / "svhn/train")
    size, none = (lambda image: image.size), (lambda image: 0)
    read = ImglistDataset("svhn", "list.txt", str(data), 2, size, none)
    assert [(read[i]["data"], read[i]["label"]) for i in range(3)] == [
        ((4, 4), i // 2) for i in range(3)
    ]
