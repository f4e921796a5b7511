"""The commands, and what runs them: real wget and hf on this machine, a gdown of ours."""

import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mmlm.errors import ConfigError, DataError
from mmlm.preparation import download
from mmlm.preparation.download import (
    download_commands,
    download_names,
    find_program,
    run_commands,
)
from mmlm.preparation.layout import Playground
from mmlm.preparation.sources import DATASET_REPOSITORY, SOURCES, Source, Tool

needs_wget = pytest.mark.skipif(find_program("wget") is None, reason="wget is not installed")
needs_hf = pytest.mark.skipif(find_program("hf") is None, reason="hf is not installed")


class Stand(http.server.BaseHTTPRequestHandler):
    """Serves ``files`` by path, from any byte on, and notes the requests."""

    protocol_version = "HTTP/1.1"

    def __init__(self, state: dict[str, object], *arguments: object) -> None:
        self.state = state
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        files = self.state["files"]
        requests = self.state["requests"]
        assert isinstance(files, dict) and isinstance(requests, list)
        span = self.headers.get("Range", "")
        requests.append((self.path, span))
        data = files.get(self.path)
        start = int(span.removeprefix("bytes=").partition("-")[0] or 0) if span else 0
        missing = data is None or start >= max(1, len(data))
        status = 404 if data is None else 416 if missing else 206 if span else 200
        body = b"" if missing or data is None else data[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "c" * 40)
        if span and data is not None:
            served = "*" if missing else f"{start}-{len(data) - 1}"
            self.send_header("Content-Range", f"bytes {served}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def stand() -> Iterator[tuple[str, dict[str, object]]]:
    """A server on this machine: its address, and what it serves."""
    state: dict[str, object] = {"files": {}, "requests": []}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Stand, state))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", state
    server.shutdown()
    thread.join()
    server.server_close()


def use_sources(monkeypatch: pytest.MonkeyPatch, *sources: Source) -> None:
    monkeypatch.setattr(download, "SOURCES", sources)


def put_program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Python script on PATH as a program."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{script}")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_one_command_fetches_the_dataset_repository(playground: Playground) -> None:
    (command,) = download_commands(playground, "repository")
    assert shlex.join(command.argv) == (
        f"hf download {DATASET_REPOSITORY} --repo-type dataset --local-dir {playground.root}"
    )
    assert command.shell == f"mkdir -p {playground.root} && {shlex.join(command.argv)}"


def test_parts_of_the_dataset_repository(playground: Playground) -> None:
    commands = download_commands(playground, "repository", ["annotations", "web-celebrity"])
    assert [command.argv[-2:] for command in commands] == [
        ("--include", "opensource/*"),
        ("--include", "data/web-celebrity*"),
    ]
    with pytest.raises(ConfigError, match="--only x: unknown with --source repository; known are "):
        download_commands(playground, "repository", ["x"])


@needs_wget
def test_commands_of_the_individual_sources(playground: Playground) -> None:
    commands = {one.name: one for one in download_commands(playground, "individual")}
    assert list(commands) == [source.name for source in SOURCES if not source.instead_of]
    root = playground.root
    assert commands["chartqa"].shell == (
        f"mkdir -p {root}/downloads/chartqa && wget --continue --tries 10 --output-document "
        f"{root}/downloads/chartqa/chartqa.zip.part "
        "https://huggingface.co/datasets/ahmed-masry/ChartQA/resolve/main/ChartQA%20Dataset.zip && "
        f"mv {root}/downloads/chartqa/chartqa.zip.part {root}/downloads/chartqa/chartqa.zip"
    )
    assert commands["dvqa"].argv == (
        *("gdown", "--continue", "--output", f"{root}/downloads/dvqa/images.tar.gz.part"),
        "1iKH2lTi1-QxtNUVRxTUWFvUvRHq6HAsZ",
    )
    assert commands["webdata"].argv[:5] == (
        *("gdown", "--continue", "--folder", "--output", f"{root}/downloads/webdata/"),
    )
    assert commands["synthdog-en"].shell.endswith(
        f"hf download naver-clova-ix/synthdog-en --repo-type dataset --local-dir {root}/downloads/"
        "synthdog-en --include 'data/train-0000[0-4]-of-00084-*.parquet'"
    )
    assert commands["sam"].note.startswith("the 9 thousand pictures")
    only = download_commands(playground, "individual", ["synthdog-en-images"])
    assert [command.name for command in only] == ["synthdog-en-images"]
    assert "synthdog-en-images" in download_names("individual")


@needs_wget
def test_a_file_is_fetched_once(
    playground: Playground,
    stand: tuple[str, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, state = stand
    state["files"] = {"/a%20b.zip": b"data" * 100}
    source = Source(name="a", tool=Tool.URL, address=f"{address}/a%20b.zip", file="a.zip")
    use_sources(monkeypatch, source)
    commands = download_commands(playground, "individual")
    run_commands(playground, commands)
    run_commands(playground, commands)
    assert (playground.downloads / "a" / "a.zip").read_bytes() == b"data" * 100
    assert state["requests"] == [("/a%20b.zip", "")]
    run_commands(playground, commands, again=True)
    assert len(list((playground.downloads / "a").iterdir())) == 1


@needs_wget
@pytest.mark.parametrize("num_there", [1000, 5120])
def test_a_stopped_download_continues(
    playground: Playground,
    stand: tuple[str, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    num_there: int,
) -> None:
    address, state = stand
    whole = bytes(range(256)) * 20
    state["files"] = {"/a.zip": whole}
    use_sources(
        monkeypatch, Source(name="a", tool=Tool.URL, address=f"{address}/a.zip", file="a.zip")
    )
    part = playground.downloads / "a" / "a.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:num_there])
    run_commands(playground, download_commands(playground, "individual"))
    assert (playground.downloads / "a" / "a.zip").read_bytes() == whole
    assert state["requests"] == [("/a.zip", f"bytes={num_there}-")]


@needs_wget
def test_the_printed_line_does_the_same(
    playground: Playground,
    stand: tuple[str, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, state = stand
    state["files"] = {"/a.zip": b"data"}
    use_sources(
        monkeypatch, Source(name="a", tool=Tool.URL, address=f"{address}/a.zip", file="a b.zip")
    )
    (command,) = download_commands(playground, "individual")
    subprocess.run(["bash", "-c", command.shell], check=True, capture_output=True)
    assert (playground.downloads / "a" / "a b.zip").read_bytes() == b"data"
    run_commands(playground, [command])
    assert len(state["requests"]) == 1  # type: ignore[arg-type]


@needs_wget
def test_failure_is_named_and_nothing_counts_as_there(
    playground: Playground,
    stand: tuple[str, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, _ = stand
    use_sources(
        monkeypatch, Source(name="a", tool=Tool.URL, address=f"{address}/gone.zip", file="a.zip")
    )
    commands = download_commands(playground, "individual")
    with pytest.raises(DataError, match=r"a: 'wget .*/gone.zip' failed with status 8, its own"):
        run_commands(playground, commands)
    assert not (playground.downloads / "a" / "a.zip").exists()


def test_files_and_folders_of_google_drive(
    playground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
import pathlib, sys
arguments = sys.argv[1:]
output = arguments[arguments.index("--output") + 1]
log = pathlib.Path(__file__).with_name("log")
log.write_text((log.read_text() if log.exists() else "") + " ".join(arguments) + "\\n")
if "--folder" in arguments:
    pathlib.Path(output, "wikiart.zip").write_text("zip")
else:
    pathlib.Path(output).write_text("zip")
"""
    put_program(tmp_path / "bin", "gdown", script, monkeypatch)
    use_sources(
        monkeypatch,
        Source(name="file", tool=Tool.DRIVE, address="1abc", file="a.zip"),
        Source(name="folder", tool=Tool.DRIVE_FOLDER, address="https://drive.example/f"),
    )
    for _ in range(2):
        run_commands(playground, download_commands(playground, "individual"))
    assert (playground.downloads / "file" / "a.zip").is_file()
    assert (playground.downloads / "folder" / "wikiart.zip").is_file()
    assert len((tmp_path / "bin" / "log").read_text().splitlines()) == 2


def test_program_that_makes_nothing_is_noticed(
    playground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_program(tmp_path / "bin", "gdown", "", monkeypatch)
    use_sources(monkeypatch, Source(name="a", tool=Tool.DRIVE, address="1abc", file="a.zip"))
    with pytest.raises(DataError, match=r"a: 'gdown' ended well but left no .*a.zip.part"):
        run_commands(playground, download_commands(playground, "individual"))


def test_missing_program_is_named(playground: Playground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "find_program", lambda name: None)
    with pytest.raises(DataError, match=r"'hf' is not there: pip install 'mmlm\[data\]'; or take"):
        run_commands(playground, download_commands(playground, "repository"))
    command = [one for one in download_commands(playground, "individual") if one.name == "sam"]
    with pytest.raises(
        DataError, match=r"sam: the program 'gdown' is not there: pip install gdown"
    ):
        run_commands(playground, command)


@needs_hf
def test_the_real_hf_fetches_the_repository(
    playground: Playground,
    stand: tuple[str, dict[str, object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, state = stand
    content = {"opensource/geoqa+.jsonl": b"{}\n", "data/geoqa+.zip": b"zip", "data/vg.zip": b"vg"}
    listing = {
        "id": DATASET_REPOSITORY,
        "sha": "c" * 40,
        "siblings": [{"rfilename": name} for name in content],
    }
    files: dict[str, bytes] = {}
    for revision in ("main", "c" * 40):
        api = f"/api/datasets/{DATASET_REPOSITORY}/revision/{revision}"
        files[api] = json.dumps(listing).encode()
        for name, data in content.items():
            quoted = name.replace("+", "%2B")
            for path in (name, quoted):
                files[f"/datasets/{DATASET_REPOSITORY}/resolve/{revision}/{path}"] = data
    state["files"] = files
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    run_commands(playground, download_commands(playground, "repository", ["annotations", "geoqa+"]))
    assert (playground.annotations / "geoqa+.jsonl").read_bytes() == b"{}\n"
    assert (playground.data / "geoqa+.zip").read_bytes() == b"zip"
    assert not (playground.data / "vg.zip").exists()
