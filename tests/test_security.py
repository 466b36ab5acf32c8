"""What is read runs no code, and stays where it is."""

import json
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from formats import make_coco


class Evil:
    """A pickle that runs code when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def server(tmp_path):
    """Serves ``tmp_path``; its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


class TestSecurity:
    @pytest.mark.parametrize(
        ("kind", "flags"),
        [
            *((kind, ()) for kind in ("file", "address", "pyth", "torch", "heuristics")),
            ("file", ("--eval-only",)),
            ("address", ("--eval-only",)),
        ],
    )
    def test_weights_run_no_code(self, run, tmp_path, server, monkeypatch, capsys, kind, flags):
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        marker = tmp_path / "marker"
        content = {"model": Evil(marker), "__author__": "x"}
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(content))
        torch.save(content, tmp_path / "evil.pth")
        torch.save(content, tmp_path / "evil.pyth")
        weights = {
            "file": f"{tmp_path}/evil.pkl",
            "address": f"{server}/evil.pkl",
            "pyth": f"{tmp_path}/evil.pyth",
            "torch": f"{tmp_path}/evil.pth",
            "heuristics": f"{tmp_path}/evil.pth?matching_heuristics=True",
        }[kind]
        assert run("MODEL.WEIGHTS", weights, flags=flags, score=True) == 2
        message = capsys.readouterr().err
        assert "evil" in message and "Traceback" not in message
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["evil.pkl", "../evil.pkl", "../evil.pth", "/etc/passwd"])
    def test_the_note_of_the_last_checkpoint(self, run, out, tmp_path, capsys, name):
        marker = tmp_path / "marker"
        for file in (out / "evil.pkl", tmp_path / "evil.pkl"):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(pickle.dumps({"model": Evil(marker)}))
        torch.save({"model": Evil(marker)}, tmp_path / "evil.pth")
        (out / "last_checkpoint").write_text(name)
        assert run(flags=["--resume"]) == 2
        assert "must name a .pth file of its folder" in capsys.readouterr().err
        assert not marker.exists()

    @pytest.mark.parametrize("kind", ["file", "address"])
    def test_proposals_run_no_code(self, run, tmp_path, server, monkeypatch, capsys, kind):
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        marker = tmp_path / "marker"
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"ids": Evil(marker)}))
        place = f"{tmp_path}/evil.pkl" if kind == "file" else f"{server}/evil.pkl"
        opts = ("MODEL.LOAD_PROPOSALS", True, "MODEL.PROPOSAL_GENERATOR.NAME")
        opts += ("PrecomputedProposals", "DATASETS.PROPOSAL_FILES_TRAIN", (place,))
        opts += ("DATASETS.PROPOSAL_FILES_TEST", (place,))
        assert run(*opts, config="Base-RCNN-FPN.yaml", score=True) == 2
        assert "not only lists and numpy arrays" in capsys.readouterr().err
        assert not marker.exists()

    @pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg"])
    def test_images_stay_in_their_folder(self, run, tmp_path, capsys, name):
        content = make_coco(tmp_path / "own")
        image = tmp_path / "own" / "images" / content["images"][0]["file_name"]
        (tmp_path / "own" / "secret.jpg").write_bytes(image.read_bytes())
        content["images"][0]["file_name"] = name
        file = tmp_path / "own" / "annotations.json"
        file.write_text(json.dumps(content))
        spec = (f"coco:{file}:{tmp_path}/own/images",)
        assert run("DATASETS.TRAIN", spec, "DATASETS.TEST", ()) == 2
        assert f"'{name}', which is not in" in capsys.readouterr().err
        if name.startswith(".."):
            opts = ("DATASETS.TRAIN", spec, "DATASETS.TEST", (), "DATASETS.ALLOW_OUTSIDE", True)
            assert run(*opts) == 0
