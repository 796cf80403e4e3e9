from __future__ import annotations

import pytest

from distill import files
from distill.errors import BadInput


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_nothing_and_a_taken_one_is_refused(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "out") as out:
        (out / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(tmp_path / "out") as out:
        (out / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"
    with pytest.raises(BadInput, match="exists already"), files.atomic_folder(tmp_path / "out"):
        pass


def test_json_and_csv_come_back(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert files.read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "d.json").mkdir()
    for name in ("b.json", "c.json", "d.json"):
        with pytest.raises(BadInput, match=f"{name}.*write it again"):
            files.read_json(tmp_path / name)
    files.write_csv(tmp_path / "a.csv", ["step", "loss"], [{"step": 1, "loss": 0.5}, {"step": 2}])
    assert files.read_csv(tmp_path / "a.csv") == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": ""}]
    assert files.read_csv(tmp_path / "none.csv") == []


def test_a_markdown_table():
    assert files.markdown_table(["a", "b"], [[1, 2]], "lr") == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
