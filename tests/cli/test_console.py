"""Output to consoles with a limited encoding, closed pipes and full disks, in separate processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import _console
from fastkd.cli import main

ASCII = {"PYTHONIOENCODING": "ascii"}
CP1252 = {"PYTHONIOENCODING": "cp1252"}
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
CONSOLES = [pytest.param(ASCII, id="ascii"), pytest.param(CP1252, id="cp1252"), pytest.param(C_LOCALE, id="C locale")]
RUN = "import sys; from fastkd.cli import main; sys.exit(main(sys.argv[1:]))"
SHORT = ["--steps", "1", "--batch-size", "4", "--threads", "1"]


def run(code: str, *args: str | Path, stdout: int = subprocess.PIPE, **environment: str) -> tuple[int, bytes, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=clean | environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    pytest.importorskip("timm", reason="needs the [ris] extra")
    from fastkd.data.shapes import make_shapes

    root = tmp_path_factory.mktemp("shapes") / "données"
    make_shapes(root, images=40, image_size=64)
    return root


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "34.1 ± 0.2, −3.0 – 64×64 at 50 µs… “é” 猫"),
        ("cp1252", "34.1 ± 0.2, -3.0 – 64×64 at 50 µs… “é” ?"),
        ("ascii", '34.1 +- 0.2, -3.0 - 64x64 at 50 us... "e" ?'),
    ],
)
def test_missing_characters_are_replaced_by_plain_ones(encoding, shown):
    text = "34.1 ± 0.2, −3.0 – 64×64 at 50 µs… “é” 猫"
    assert _console.plain(text, encoding) == shown
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with _console.plain_characters():
            print(text, end="", flush=True)
        assert stream.errors == "strict"
    assert stream.buffer.getvalue().decode(encoding) == shown


def test_undecodable_file_names_keep_their_bytes():
    assert "\udcc3\udca9".encode("ascii", _console._HANDLER) == "é".encode()
    assert "\udcc3\udca9".encode("utf-8", _console._HANDLER) == "é".encode()


def test_undecodable_arguments_become_text():
    for text in ("the café", "a cup", "猫"):
        assert _console.decode_argument(text.encode().decode("ascii", "surrogateescape")) == text
        assert _console.decode_argument(text) == text
    latin = b"caf\xe9".decode("ascii", "surrogateescape")
    assert _console.decode_argument(latin) == latin


def test_error_handler_of_the_user_is_kept(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="xmlcharrefreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    with _console.plain_characters():
        print("±", end="", flush=True)
    assert stream.buffer.getvalue() == b"&#177;"


@pytest.mark.parametrize("environment", CONSOLES)
def test_help_of_every_command(environment):
    code = """
import sys
from fastkd.cli import main
for command in ("", "info", "data", "train", "distill", "evaluate", "predict", "export", "convert", "demo"):
    try:
        status = main([*command.split(), "--help"])
    except SystemExit as end:
        status = end.code
    print(f"<{command}: {status}>", flush=True)
"""
    status, out, error = run(code, **environment)
    assert status == 0, error
    text = out.decode("cp1252" if environment is CP1252 else "ascii")
    assert text.count(": 0>") == text.count("usage:") == 10
    assert error == ""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("convert", "CHECKPOINT FILE"),
        ("data check", "DATA"),
        ("data convert", "DATA OUT"),
        ("data make-shapes", "OUT"),
        ("predict", "IMAGE SENTENCE ..."),
        ("report", "RUN ..."),
        ("experiments", "GRID"),
    ],
)
def test_usage_names_positional_arguments(command: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert " ".join(usage.split()).endswith(f"OPTIONS] {arguments}")


def test_training_in_the_c_locale_succeeds_and_prints_scores(shapes, tmp_path):
    out = tmp_path / "größe"
    status, shown, error = run(RUN, "train", "--data", shapes, "--out", out, *SHORT, **C_LOCALE)
    assert status == 0, error
    assert (out / "best" / "model.safetensors").is_file()
    assert b"mIoU" in shown
    assert b"64x64" in shown
    assert "\\x" not in error
    assert os.fsencode(out) in shown  # the path, byte for byte


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_console_table_in_a_script_uses_plain_characters(encoding):
    pytest.importorskip("rich", reason="needs the [ris] extra")
    code = """
from fastkd.report import ResultRow, console_table
console_table([ResultRow("größer", None, {"mIoU": [30.0, 32.0]}),
               ResultRow("distilled", 3, {"mIoU": [29.0, 31.0]}, baseline="größer", note="σ−")], title="IoU → %")
"""
    status, out, error = run(code, PYTHONIOENCODING=encoding)
    assert status == 0, error
    text = out.decode(encoding)
    assert "IoU -> %" in text
    assert ("grosser" if encoding == "ascii" else "größer") in text
    assert ("31.0 +- 1.4" if encoding == "ascii" else "31.0 ± 1.4") in text
    assert "-1.0" in text


KEEPS_FILES = "from fastkd._console import show; show('student: best'); show('again')"
# A command whose only result is its output. The facts are replaced, because collecting them takes seconds.
INFO = "import fastkd._info; fastkd._info.info = lambda: {'versions': 1}; " + RUN


def test_closed_pipe_does_not_fail_a_run():
    reader, writer = os.pipe()
    os.close(reader)
    assert run(KEEPS_FILES, stdout=writer)[::2] == (0, "")
    assert run(INFO, "info", stdout=writer)[::2] == (141, "")  # the status of SIGPIPE
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk():
    with open("/dev/full", "wb") as full:
        status, _, error = run(KEEPS_FILES, stdout=full.fileno())
        assert status == 0, error
        assert error.count("fastkd: warning: standard output cannot be written") == 1
        status, _, error = run(INFO, "info", stdout=full.fileno())
    assert status == 2
    assert error.startswith("fastkd: error: ")


def test_progress_without_a_terminal_is_silent(monkeypatch):
    from fastkd.train.log import Progress

    monkeypatch.setattr(sys, "stderr", None)
    Progress(3, "run", True).print("step 1")

    class ClosedStream(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", ClosedStream())
    progress = Progress(3, "run", True)
    progress.print("step 1")
    assert not progress.shown
    progress.close()


def test_unencodable_file_name_is_a_one_line_error(tmp_path):
    pytest.importorskip("PIL", reason="needs the [ris] extra")
    code = RUN.replace("sys.argv[1:]", "[*sys.argv[1:-1], sys.argv[-1] + '\\xf8']")
    status, _, error = run(code, "data", "make-shapes", "--images", "4", tmp_path / "n", **C_LOCALE)
    assert status == 2
    assert "set PYTHONUTF8=1, or a UTF-8 locale" in error
