"""`export --push`, by huggingface_hub against a stand-in of the Hub's interface."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402

TOKEN = "hf_of_a_writer"


class Hub(BaseHTTPRequestHandler):
    """What an upload asks for: who is it, make a repository, how to send, one commit."""

    asked: list[tuple[str, dict]]
    files: dict[str, bytes]
    deleted: list[str]
    refuses = False

    def log_message(self, *_: object) -> None:
        """Nothing to standard error."""

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/whoami-v2":
            self._answer(
                200, {"name": "somebody", "type": "user", "auth": {"type": "access_token"}}
            )
        elif "/tree/" in self.path:
            old = [{"type": "file", "path": n, "size": 1, "oid": "0"} for n in OLD]
            self._answer(200, old)
        else:
            found = [{"rfilename": name} for name in OLD]
            self._answer(200, {"id": "somebody/hydra", "sha": "0" * 40, "siblings": found})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            type(self).asked.append((self.path, json.loads(body)))
            url = f"http://{self.headers['Host']}/somebody/hydra"
            self._answer(200, {"url": url, "name": "somebody/hydra"})
        elif "/preupload/" in self.path:
            files = [
                {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                for item in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" not in self.path:  # the model card's head is looked over
            self._answer(200, {"errors": [], "warnings": []})
        elif type(self).refuses:
            self._answer(403, {"error": "You are over your quota"})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    type(self).files[line["value"]["path"]] = content
                elif line["key"] == "deletedFile":
                    type(self).deleted.append(line["value"]["path"])
            url = f"http://{self.headers['Host']}/somebody/hydra/commit/{'1' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})


OLD = ("model-00001-of-00002.safetensors", "model.safetensors", "notes.md")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, which huggingface_hub takes for the Hub, and a login."""
    own = type("OwnHub", (Hub,), {"asked": [], "files": {}, "deleted": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield own
    server.shutdown()


def _export(models: Path, out: Path, *more: str) -> int:
    return cli.main(["export", "--model", f"{models}/hybrid", "--out", str(out), *more])


def test_what_is_pushed_is_the_folder(models, tmp_path, hub, capsys):
    out = tmp_path / "hf"
    assert _export(models, out, "--push", "somebody/hydra") == 0
    written = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert hub.files == written and {"config.json", "modeling_hydra.py"} <= {*written}
    # Weights of an earlier export would be loaded in place of these; notes are not ours.
    assert hub.deleted == ["model-00001-of-00002.safetensors"]
    ((_, made),) = hub.asked
    assert made["name"] == "hydra" and made["organization"] == "somebody"
    assert made["private"] is True
    said = capsys.readouterr()
    assert f"on the Hub: {constants.ENDPOINT}/somebody/hydra" in said.out
    assert TOKEN not in said.out + said.err


def test_a_stranger_is_told_before_the_work(models, tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert _export(models, tmp_path / "hf", "--push", "somebody/hydra") == 2
    assert not (tmp_path / "hf").exists() and not hub.asked
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the Hub does not know who you are" in line and "`hf auth login`" in line


def test_a_refused_folder_is_there(models, tmp_path, hub, capsys):
    hub.refuses = True
    assert _export(models, tmp_path / "hf", "--push", "somebody/hydra", "--public") == 2
    assert hub.asked[0][1]["private"] is False and (tmp_path / "hf/config.json").is_file()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the export to {tmp_path}/hf is done, but it could not be pushed" in line
    assert f"`hf upload somebody/hydra {tmp_path}/hf`" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "a/b/c"], "--push a/b/c: Repo id must be in the form"),
        (["--public"], "--public says how --push makes a repository"),
    ],
)
def test_arguments_that_cannot_be(models, tmp_path, capsys, arguments, message):
    out = ["--out", f"{tmp_path}/hf"]
    assert cli.main(["export", "--model", f"{models}/hybrid", *out, *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "hf").exists()
