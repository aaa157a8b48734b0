"""The doors one by one: bounded reads, paths that stay where they belong, pictures, YAML, questions, and one sentence for each."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from door_cases import bounded
from fakes import fake_executor
from PIL import Image
from rich.console import Console
from stores import fixed_store

import vtc
from vtc import cli, doors, inspect
from vtc.counts import UncountableError, image_processor
from vtc.errors import ConfigError, InputFileError, PromptError, StoreError, UnsupportedModelError
from vtc.eval import cells, config, contents, models, questions, stats, yamlfile
from vtc.eval.browser import browse
from vtc.eval.report import write_report
from vtc.eval.run import Sweep
from vtc.eval.store import Store
from vtc.eval.sweepfile import load_sweep, parse_sweep
from vtc.pocket import pocket_path, scene_questions

QUIET = Console(quiet=True)
SWEEP = "data: {scenes: {n: 6}}\nbudgets: [49]\nreducers: [fastv]\nspeed: false\nthreads: 1\n"
OWN = "tasks: [{name: mine, folder: pics, questions: qa.csv}]\nbudgets: [49]\nreducers: []\nspeed: false\nthreads: 1\n"


@pytest.fixture
def call(capsys):
    """Run the command line; return exit code, output, and error output, which holds one sentence if there is an error."""

    def go(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return go


@pytest.fixture
def refused(call):
    """Run the command line; it must refuse with one sentence, which is returned."""

    def go(*arguments: object) -> str:
        code, out, err = call(*arguments)
        assert (code, out) == (1, ""), (code, out, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and "(unexpected:" not in err and "Traceback" not in err
        assert len(err) < 1200
        return err

    return go


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 20), (200, 10, 10)).save(path)
    return path


# -------------------------------------------------------------------------------------------------------- files and paths
def test_only_ordinary_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert doors.read_bytes(tmp_path / "a", 5) == b"12345" and doors.read_text(tmp_path / "a", 5) == "12345"
    with pytest.raises(InputFileError, match="larger than such a file may be"):
        doors.read_bytes(tmp_path / "a", 4)
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/zero", tmp_path / "link")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "link", "a device"), (tmp_path, "a folder")):
        with pytest.raises(InputFileError, match=rf"there is no table '.*' \({kind} cannot be read\)"):
            doors.read_bytes(path, 10**9, "table")
    with pytest.raises(FileNotFoundError):
        doors.read_bytes(tmp_path / "b", 5)
    with pytest.raises(InputFileError, match="cannot be a path"):
        doors.read_bytes("a\0b", 5)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_file_that_says_it_is_empty_is_bounded_all_the_same():
    assert os.stat("/proc/self/environ").st_size == 0
    with pytest.raises(InputFileError, match="larger than"):
        doors.read_bytes("/proc/self/environ", 4)


def test_paths_do_not_leave_their_folder(tmp_path):
    folder = tmp_path / "pics"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "in.png", folder / "deep" / "in.png", tmp_path / "out.png"):
        path.touch()
    os.symlink(folder / "in.png", folder / "link-in.png")
    os.symlink(tmp_path / "out.png", folder / "link-out.png")
    os.symlink(tmp_path, folder / "up")
    os.symlink(folder / "loop", folder / "loop")
    os.symlink(folder, tmp_path / "named")
    for name in ("in.png", "deep/in.png", "deep/../in.png", "link-in.png", str(folder / "in.png"), "absent.png"):
        assert doors.inside(folder, name).is_relative_to(folder)
        assert doors.inside(tmp_path / "named", name).is_relative_to(folder), "the folder itself may be a link"
    outside = (
        "../out.png",
        "deep/../../out.png",
        str(tmp_path / "out.png"),
        "link-out.png",
        "up/out.png",
        "/etc/hostname",
        "..",
    )
    for name in outside:
        with pytest.raises(InputFileError, match="is not in the folder"):
            doors.inside(folder, name)
    for name in ("a\0b", "loop", "x" * 5000):
        try:
            doors.inside(folder, name)
        except InputFileError as error:
            assert "cannot be a path" in str(error)


def test_text_for_messages_is_one_printable_line():
    assert doors.short("a\n b\x1b[2J\ud800" + "x" * 500, 20) == "a b?[2J?" + "x" * 9 + "..."
    assert doors.unprintable("tab\tand\nline") == "" and doors.unprintable("a\x1bb") == r"'\x1b'"


LONG = "a" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", LONG),
        ("check", "~nobody-of-that-name/model"),
        ("run", "--image", LONG, "--prompt", "x", "--reducer", "fastv", "--keep", "9"),
        ("run", "--image", "PIC", "--prompt", "x", "--reducer", "fastv", "--keep", "9", "--show", LONG + ".png"),
        ("sweep", LONG + ".yaml"),
        ("sweep", "~nobody-of-that-name/s.yaml"),
        ("sweep", "FILE", "--out", LONG),
        ("table", LONG),
        ("table", "STORE", "--output", LONG),
        ("table", "STORE", "--paper", LONG),
        ("plot", "STORE", "--out", LONG),
        ("report", "STORE", "--output", LONG),
        ("report", "STORE", "--data", LONG),
        ("tune", LONG, "--reducers", "fastv", "--target-drop", "1%"),
        ("tune", "pocket", "--reducers", "uniform", "--target-drop", "1%", "--out", LONG),
        ("bench", "plot", LONG),
    ],
)
def test_names_longer_than_the_file_system_takes(refused, call, tmp_path, picture, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SWEEP)
    fixed_store(tmp_path / "store")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    named = {"PIC": picture, "FILE": tmp_path / "s.yaml", "STORE": tmp_path / "store"}
    given = [named.get(a, a) for a in arguments]
    if "--data" in arguments:  # nothing below it is asked for here: the report is written
        assert call(*given)[2].count("(unexpected:") == 0
        return
    refused(*given)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before, "nothing half done"


# --------------------------------------------------------------------------------------------------------------- pictures
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def test_pictures_are_of_a_few_formats_whatever_their_name(tmp_path, monkeypatch):
    image = Image.new("RGB", (20, 20), (200, 10, 10))
    for ending, kind in (("png", "PNG"), ("jpg", "JPEG"), ("bmp", "BMP"), ("gif", "GIF"), ("tiff", "TIFF"), ("ppm", "PPM")):
        image.save(tmp_path / f"a.{ending}", kind)
        os.replace(tmp_path / f"a.{ending}", tmp_path / "named.dat")
        assert doors.open_image(tmp_path / "named.dat").size == (20, 20)
    (tmp_path / "script.png").write_bytes(POSTSCRIPT)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    for kind, data in (("script.png", POSTSCRIPT), ("a.icns.png", b"icns\0\0\0\x08"), ("x.png", b"8BPS\0\1" + bytes(40))):
        (tmp_path / kind).write_bytes(data)
        with pytest.raises(InputFileError, match="is not an image that vtc reads"):
            doors.open_image(tmp_path / kind)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bits_are_scaled_not_cut_off(tmp_path, kind):
    """Pillow's own conversion makes everything above 255 white."""
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / f"a.{kind}")
    read = np.asarray(doors.open_image(tmp_path / f"a.{kind}"))
    assert np.abs(read - grey[..., None] / 257).max() <= 0.5 and read.shape == (64, 64, 3)


@pytest.mark.parametrize(("values", "said"), [(np.float32, "fractions"), (np.int32, "32-bit whole numbers")])
def test_pixels_of_which_none_is_known_to_be_white_are_refused(tmp_path, values, said):
    """Pillow's own conversion makes fractions black."""
    Image.fromarray(np.full((8, 8), 0.5 if values is np.float32 else 70_000, values)).save(tmp_path / "a.tiff")
    with pytest.raises(InputFileError, match=f"a.tiff' holds {said} of which none is known to be white: save it with 8 or 16"):
        doors.open_image(tmp_path / "a.tiff")


def test_pictures_of_a_task_go_through_the_same_door(tmp_path):
    """As lmms-eval hands them over: open, 16-bit ones among them, and turned on the side by their camera."""
    pytest.importorskip("lmms_eval")
    from vtc.eval.lmms.model import _image

    Image.fromarray(np.full((4, 8), 257 * 100, np.uint16)).save(tmp_path / "a.png")
    turned = Image.new("RGB", (8, 4))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b.png", exif=exif)
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            seen = _image(image)
        assert np.array_equal(np.asarray(seen), np.asarray(_image(str(tmp_path / name))))
    assert seen.size == (4, 8) and seen.getpixel((3, 0)) == (255, 255, 255)
    assert np.asarray(_image(str(tmp_path / "a.png"))).tolist() == [[[100] * 3] * 8] * 4


def test_bombs_pipes_and_endless_sides_are_refused(tmp_path, monkeypatch):
    header = b"P6 65000 65000 255\n"
    (tmp_path / "bomb.ppm").write_bytes(header + bytes(100))
    with pytest.raises(InputFileError, match="more pixels than a picture may have"):
        doors.open_image(tmp_path / "bomb.ppm")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    for side, said in ((20, "more pixels"), (30, "more pixels")):  # Pillow's warning, and its error
        Image.new("RGB", (side, side)).save(tmp_path / "a.png")
        with pytest.raises(InputFileError, match=said):
            doors.open_image(tmp_path / "a.png")
    monkeypatch.undo()
    Image.new("RGB", (30_000, 1)).save(tmp_path / "wide.png")
    with pytest.raises(InputFileError, match=r"30000x1 pixels: one side may be at most 200 times the other"):
        doors.open_image(tmp_path / "wide.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputFileError, match=r"there is no image file .* \(a pipe cannot be read\)"):
        doors.open_image(tmp_path / "pipe.png")
    with pytest.raises(InputFileError, match=r"a device cannot be read"):
        doors.open_image("/dev/zero")


# ------------------------------------------------------------------------------------------------------------ sweep files
def nine(levels: int) -> str:
    """A list of nine, nine times, nine times ..."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (nine(9), ("line", "with its aliases", "more than 50,000 entries")),
        (MERGES, ("with its aliases", "50,000 entries")),
        ("a: &a [*a]\n", ("line 1", "an alias (*name) stands inside what it names")),
        ("a: &a {b: {c: *a}}\n", ("stands inside what it names",)),
        ("a: " + "[" * 100 + "]" * 100, ("line 1", "nested more than 32 levels")),
        ("a: " + "[" * 5000, ("nested more than 32 levels",)),
        ("".join(f"{' ' * i}a:\n" for i in range(3000)), ("s.yaml",)),
        ("x" * 300_000, ("longer than such a file may be",)),
        (SWEEP + f"seed: {'9' * 5000}\n", ("a number or a date in it is none",)),
        (SWEEP + "seed: 2020-99-99\n", ("a number or a date in it is none",)),
        (SWEEP + "seed: !!float x\n", ("a number or a date in it is none",)),
        (SWEEP + "seed: !!bool x\n", ("a number or a date in it is none",)),
        (SWEEP + "seed: !!timestamp x\n", ("a number or a date in it is none",)),
        (SWEEP + "? [a, b]\n: c\n", ("not valid YAML",)),
        (SWEEP + "1: 2\n", ("s.yaml",)),
        (SWEEP + 'model: {name: pocket, label: "a\\u001b[2Jb"}\n', ("line 6", r"the character '\x1b'")),
        (SWEEP + 'model: {name: pocket, label: "\\ud800"}\n', ("line 6", r"the character '\ud800'")),
        (SWEEP + 'model: {name: pocket, label: "a\\nb"}\n', ("model.label", "one line of text")),
        (SWEEP + 'model: {name: "a\\0b"}\n', ("line 6", r"the character '\x00'")),
        (SWEEP.replace("{n: 6}", "{n: 1000000000}"), ("data.scenes.n", "less than or equal to 50000")),
        (SWEEP.replace("data: {scenes: {n: 6}}", "tasks: [{name: scenes, n: 60000}]"), ("tasks[0]", "at most 50000")),
        (
            SWEEP.replace(
                "data: {scenes: {n: 6}}", "tasks: [" + "{name: scenes, n: 50000, label: t%d}, " * 3 % (1, 2, 3) + "]"
            ),
            ("more than 100000 questions",),
        ),
        (SWEEP + f"seed: {2**64}\n", ("seed", "less than or equal to 4294967295")),
        (SWEEP + f"seeds: [0, {2**70}]\n", ("seeds[1]", "less than or equal to 4294967295")),
        (SWEEP.replace("{n: 6}", f"{{n: 6, seed: {2**40}}}"), ("data.scenes.seed", "less than or equal to 1073741823")),
        (SWEEP + f"seeds: [{', '.join(map(str, range(20_000)))}]\n", ("100,000 cells", "may have 50,000")),
        (SWEEP.replace("[fastv]", "[{name: fastv, options: {layer: two}}]"), ("line 3", "layer='two' is not possible")),
        (SWEEP.replace("[fastv]", "[{name: fastv, options: {layer: 2020-01-01}}]"), ("line 3", "is not possible")),
        (SWEEP.replace("[fastv]", f"[{{name: random, options: {{seed: {2**64}}}}}]"), ("line 3", "is too large")),
    ],
)
def test_sweep_files_without_an_end_or_a_meaning(text, parts):
    with bounded(), pytest.raises(ConfigError) as caught:
        parse_sweep(text, source="s.yaml")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    for part in parts:
        assert part in message, message


def test_ordinary_aliases_and_merges_work():
    text = "x: &x {n: 6}\n" + SWEEP.replace("{n: 6}", "*x")
    with pytest.raises(ConfigError, match="unknown key 'x'"):
        parse_sweep(text)
    _, data = yamlfile.parse_yaml("a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {d: 1}, e: 2}\n", "x")
    assert data == {"a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"d": 1, "e": 2}}


@pytest.mark.parametrize(
    "arguments", [("sweep", "FILE"), ("sweep", "FILE", "--dry-run"), ("tune", "FILE", "--target-drop", "1%")]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_sweep_file_that_is_no_file(refused, tmp_path, arguments, kind):
    path = tmp_path / "s.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        os.symlink("/dev/zero", path)
    else:
        path.write_text(SWEEP + "#" * 300_000)
    said = refused(*(path if a == "FILE" else a for a in arguments))
    assert {"pipe": "a pipe cannot be read", "device": "a device cannot be read", "large": "larger than such"}[kind] in said


def test_a_sweep_file_whose_name_is_not_text(call, refused, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/s\xff.yaml")
    Path(path).write_text(SWEEP)
    assert "is not UTF-8 text" in refused("sweep", path, "--out", tmp_path / "store")
    with pytest.raises(ConfigError, match="rename it"):
        load_sweep(path)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("budgets." + "9" * 5000 + "=1", ("must be a number below",)),
        ("a" + ".a" * 50 + "=1", ("no key of a sweep file is like that",)),
        ("seed=" + "[" * 3000, ("nested more than",)),
        ("seed=2020-99-99", ("a number or a date in it is none",)),
        ("model=&a [*a]", ("stands inside what it names",)),
    ],
)
def test_overrides_have_the_bounds_of_the_file(item, parts):
    with pytest.raises(ConfigError) as caught:
        parse_sweep(SWEEP, [item])
    assert "--set" in str(caught.value) and all(part in str(caught.value) for part in parts) and len(str(caught.value)) < 1000


def test_files_of_published_numbers_have_the_bounds_of_sweep_files(refused, tmp_path):
    fixed_store(tmp_path / "store")
    for name, text in (("nine", nine(9)), ("self", "a: &a [*a]\n"), ("deep", "[" * 5000), ("date", "a: 2020-99-99\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
        refused("table", tmp_path / "store", "--paper", tmp_path / f"{name}.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "a pipe cannot be read" in refused("table", tmp_path / "store", "--paper", tmp_path / "pipe.yaml")


# --------------------------------------------------------------------------------------------------------------- own data
@pytest.fixture
def own(tmp_path):
    """A folder of pictures, one of them secret and outside; write the table and return the sweep that names it."""
    (tmp_path / "pics").mkdir()
    for i, q in enumerate(scene_questions("test", 3)):
        q.image.save(tmp_path / "pics" / f"{i}.png")
    scene_questions("val", 1)[0].image.save(tmp_path / "secret.png")

    def make(lines: str | bytes) -> Path:
        (tmp_path / "qa.csv").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        (tmp_path / "s.yaml").write_text(OWN)
        return tmp_path / "s.yaml"

    return make


HEAD = "image,question,answer\n"
TYPED = "image,question,answer,type\n"


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (
            HEAD + "0.png,what color?,red\n1.png,Is the square red, or blue?,red\n",
            ("line 3", "4 values for 3 columns", "quotes"),
        ),
        (TYPED + "0.png,Is it red, or blue?,red\n", ("line 2", "'or blue?' begins with a blank", "quotes")),
        (TYPED + "0.png,what color?,red\n", ("line 2", "3 values for 4 columns")),
        (HEAD + '0.png,"what,red\n1.png,what,red\n', ("line 2", "correct its quotes")),
        (HEAD + '0.png,"what"x,red\n', ("line 2", "correct its quotes")),
        (HEAD + '0.png,"what\ncolor?",red\n1.png,a,b,c\n', ("line 4", "4 values")),
        ("image,question,answer,answer\n0.png,a,b,c\n", ("line 1", "'answer' appears a second time")),
        (HEAD + "0.png,what\x1b[2J,red\n", ("line 2", r"the character '\x1b'")),
        (HEAD + "0.png,a\x00b,red\n", ("line 2", r"the character '\x00'")),
        (HEAD.encode() + b"0.png,\xff,red\n", ("cannot be read as CSV in UTF-8",)),
        (HEAD + f"0.png,{'long ' * 5000},red\n", ("line 2", "the question has", "may have 20,000")),
        (TYPED + "".join(f"0.png,a,b,t{i}\n" for i in range(201)), ("201 different types",)),
        (HEAD + "../secret.png,a,b\n", ("line 2", "'../secret.png' is not in the folder")),
        (HEAD + "0.png,a,b\nSECRET,a,b\n", ("line 3", "is not in the folder")),
        (HEAD + "link.png,a,b\n", ("line 2", "'link.png' is not in the folder")),
        (HEAD + "pipe.png,a,b\n", ("line 2", "a pipe cannot be read")),
        (HEAD + "pics.png,a,b\n", ("line 2", "a folder cannot be read")),
        (HEAD + "wide.png,a,b\n", ("line 2", "one side may be at most")),
    ],
)
def test_lines_and_pictures_that_are_refused(own, refused, tmp_path, lines, parts):
    if isinstance(lines, str):
        lines = lines.replace("SECRET", str(tmp_path / "secret.png"))
    pics = tmp_path / "pics"
    os.symlink(tmp_path / "secret.png", pics / "link.png")
    os.mkfifo(pics / "pipe.png")
    (pics / "pics.png").mkdir()
    Image.new("RGB", (30_000, 1)).save(pics / "wide.png")
    said = refused("sweep", own(lines), "--out", tmp_path / "store")
    for part in ("qa.csv", *parts):
        assert part in said
    assert not (tmp_path / "store").exists()


def test_a_quoted_comma_and_a_loose_header_are_fine(own):
    rows = [
        (HEAD + '0.png,"Is the square red, or blue?",red\n', "Is the square red, or blue?"),
        ("image, question, answer\n0.png, what color?, red\n", "what color?"),
        (HEAD + '0.png,"what\ncolor?",red\n\n', "what\ncolor?"),
    ]
    for lines, question in rows:
        sweep = Sweep(load_sweep(own(lines)))
        assert [(q.prompt, q.answer) for q in sweep.questions["mine"]] == [(question, "red")]


@pytest.mark.parametrize("kind", ["pipe", "device", "large", "folder"])
def test_a_table_of_questions_that_is_no_file(own, refused, tmp_path, monkeypatch, kind):
    path, table = own(HEAD + "0.png,a,b\n"), tmp_path / "qa.csv"
    monkeypatch.setattr(questions, "TABLE_BYTES", 1000)
    if kind == "large":
        table.write_text(HEAD + "0.png,a,b\n" * 200)
    else:
        table.unlink()
        {"pipe": os.mkfifo, "device": lambda p: os.symlink("/dev/zero", p), "folder": os.mkdir}[kind](table)
    said = refused("sweep", path, "--out", tmp_path / "store", "--dry-run")
    assert ("larger than" if kind == "large" else f"a {kind} cannot be read") in said


def test_a_table_with_too_many_lines(own, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "TABLE_ROWS", 3)
    said = refused("sweep", own(HEAD + "0.png,a,b\n" * 4), "--out", tmp_path / "store")
    assert "line 5: more than 3 questions" in said
    assert questions.TABLE_ROWS < 1_000_000


# -------------------------------------------------------------------------------------------------------------- questions
@pytest.mark.parametrize(
    ("prompt", "said"), [("is <image> red?", "'<image>', which stands for a picture"), ("red " * 600, "made for 512")]
)
def test_questions_that_a_model_cannot_be_asked(own, refused, picture, tmp_path, monkeypatch, prompt, said):
    run = ("run", "--image", picture, "--prompt", prompt, "--reducer", "fastv", "--keep", "9")
    monkeypatch.setattr("vtc.trial._once", lambda *_, **__: pytest.fail("a model ran"))
    assert said in refused(*run)
    monkeypatch.setattr("vtc.eval.models.load", lambda *_: pytest.fail("weights were loaded"))
    own_said = refused("sweep", own(HEAD + f"0.png,{prompt},red\n"), "--out", tmp_path / "store")
    assert said in own_said and "the question '0.png/2'" in own_said and not (tmp_path / "store").exists()


def test_questions_are_measured_before_any_is_answered():
    model, processor = vtc.load_pocket()
    from dataclasses import replace

    from vtc.pocket import answer_questions, encode_questions

    first = scene_questions("test", 1)[0]
    with pytest.raises(PromptError, match="which stands for a picture"):
        encode_questions(processor, [replace(first, prompt="<image>")])
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(PromptError, match=rf"the question '{first.id}' takes [\d,]+ tokens"):
            answer_questions(model, processor, [replace(first, prompt="red " * 600)])
    finally:
        hook.remove()
    assert not calls


# ---------------------------------------------------------------------------------------------------------------- reports
def swept(path: Path, root: Path) -> tuple[Sweep, Store]:
    sweep, store = Sweep(load_sweep(path), str(path)), Store(root, create=True)
    executor = fake_executor()
    real = {q.id: q for q in sweep.questions["mine"]}

    def answers(job):
        data = type(executor.worker).answers(executor.worker, job)
        base = data["samples"][0]
        data["samples"] = [{**base, "id": q.id, "image": q.id.rpartition("/")[0], "type": q.type} for q in real.values()]
        data["metrics"] |= {"n": len(real), "correct": base["correct"] * len(real), "accuracy": base["score"]}
        return data

    executor.worker.answers = answers
    assert sweep.run(store, QUIET, executor=executor).failed == 0
    return sweep, store


def test_a_report_reads_no_file_that_the_store_names(own, tmp_path, monkeypatch):
    """A store from somebody else names files of the reader: their content must not end up in the page."""
    sweep, store = swept(own(HEAD + "0.png,what color?,red\n1.png,how many?,3\n"), tmp_path / "store")
    fresh = browse(store, overlays=False, asked=sweep.questions)
    assert all(s.image and s.question for s in fresh.samples), "the sweep itself has them at hand"
    with monkeypatch.context() as patched:
        patched.setattr("vtc.eval.pictures.open_image", lambda *_: pytest.fail("a picture was opened"))
        patched.setattr("vtc.eval.questions._rows", lambda *_: pytest.fail("a table was read"))
        foreign = browse(store, overlays=False)
    assert not any(s.image or s.question for s in foreign.samples) and len(foreign.samples) == 2
    assert any("name the folder they are in with --data" in note for note in foreign.notes)
    page = write_report(store, tmp_path / "page.html", overlays=False).read_text()
    assert "what color?" not in page


def test_with_data_a_report_looks_below_that_folder_only(own, tmp_path, call):
    path = own(HEAD + "0.png,what color?,red\n1.png,how many?,3\n")
    _, store = swept(path, tmp_path / "store")
    moved = tmp_path / "elsewhere" / "data"
    shutil.copytree(tmp_path / "pics", moved / "pics")
    shutil.copy(tmp_path / "qa.csv", moved)
    shutil.rmtree(tmp_path / "pics")
    found = browse(store, overlays=False, data=moved)
    assert all(s.image and s.question for s in found.samples)
    code, out, _ = call("report", store.root, "--data", moved, "--no-overlays", "-o", tmp_path / "p.html")
    assert code == 0 and "what color?" in (tmp_path / "p.html").read_text()
    (moved / "qa.csv").write_text(HEAD + "0.png,what shape?,red\n1.png,how many?,3\n")
    changed = browse(store, overlays=False, data=moved)
    assert not any(s.question for s in changed.samples) and any("not those that were answered" in n for n in changed.notes)
    (moved / "pics" / "0.png").unlink()
    os.symlink(tmp_path / "secret.png", moved / "pics" / "0.png")
    shutil.copy(tmp_path / "qa.csv", moved)
    assert any("is not in the folder" in n for n in browse(store, overlays=False, data=moved).notes)


@pytest.mark.parametrize("folder", ["/etc", "../../..", "~"])
def test_a_record_cannot_lead_out_of_the_data_folder(own, tmp_path, folder):
    _, store = swept(own(HEAD + "0.png,what color?,red\n"), tmp_path / "store")
    data = json.loads((store.root / "sweep.json").read_text())
    data["config"]["tasks"][0] |= {"folder": folder, "questions": f"{folder}/../qa.csv"}
    (store.root / "sweep.json").write_text(json.dumps(data))
    found = browse(store, overlays=False, data=tmp_path / "pics")
    assert not any(s.image for s in found.samples) and any("cannot be shown" in n for n in found.notes)


def test_a_record_cannot_ask_for_more_questions_than_were_answered(own, tmp_path, monkeypatch):
    _, store = swept(own(HEAD + "0.png,what color?,red\n"), tmp_path / "store")
    data = json.loads((store.root / "sweep.json").read_text())
    data["config"]["tasks"] = [{"name": "mine", "data": {"scenes": {"n": 50_000}}}]
    (store.root / "sweep.json").write_text(json.dumps(data))
    monkeypatch.setattr("vtc.eval.questions.scene_questions", lambda *_: pytest.fail("questions were made"))
    assert any("other questions than the store has answers to" in n for n in browse(store, overlays=False).notes)


# ----------------------------------------------------------------------------------------------------------------- stores
def wrong_kind(name: str):
    def change(root: Path) -> None:
        path = root / name if name != "CELL" else next((root / "cells").iterdir())
        folder = path.is_dir()
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        path.write_text("x") if folder or name in ("locks", "quarantine", "plots") else path.mkdir()

    return change


def edited(**changes):
    def change(root: Path) -> None:
        data = json.loads((root / "sweep.json").read_text())
        (root / "sweep.json").write_text(json.dumps({**data, **changes}))

    return change


def in_cell(name: str):
    def change(root: Path) -> None:
        path = next((root / "cells").iterdir()) / name
        path.unlink()
        os.mkfifo(path) if name == "metrics.json" else path.mkdir()

    return change


@pytest.mark.parametrize("command", ["table", "plot", "report", "sweep"])
@pytest.mark.parametrize(
    "change",
    [
        lambda root: shutil.rmtree(root / "cells"),
        wrong_kind("cells"),
        wrong_kind("sweep.json"),
        wrong_kind("store.json"),
        wrong_kind("locks"),
        wrong_kind("quarantine"),
        wrong_kind("plots"),
        wrong_kind("CELL"),
        in_cell("samples.jsonl"),
        in_cell("status.json"),
        in_cell("metrics.json"),
        edited(cells={"a": 1}),
        edited(cells=[{"id": "../../../etc", "label": "a", "reducer": "b", "budget": "c"}]),
        edited(config=[]),
        edited(config={"bootstrap": {"resamples": "x", "confidence": 0.95}}),
        edited(models=3, model=None),
        edited(env={}),
        edited(constant_guess={"a": "b"}),
        lambda root: (root / "sweep.json").write_text("[]"),
        lambda root: (root / "sweep.json").write_text("[" * 100_000),
    ],
)
def test_a_store_whose_parts_are_missing_or_of_the_wrong_kind(call, tmp_path, monkeypatch, change, command):
    """A result, or one sentence; never a wait, never a bug report."""
    worker = fake_executor().worker
    monkeypatch.setattr("vtc.eval.executors.Worker", lambda: worker)
    (tmp_path / "s.yaml").write_text(SWEEP)
    config_ = load_sweep(tmp_path / "s.yaml")
    store = Store(tmp_path / "store", create=True)
    assert Sweep(config_, "s.yaml").run(store, QUIET, executor=fake_executor()).failed == 0
    change(store.root)
    arguments = {"sweep": ("sweep", tmp_path / "s.yaml", "--out", store.root)}.get(command, (command, store.root))
    code, _, err = call(*arguments)
    assert "(unexpected:" not in err and "Traceback" not in err, err
    if code:
        assert err.strip().splitlines()[-1].startswith("error: ")


def test_what_a_record_must_hold_is_said(tmp_path):
    good = json.loads((fixed_store(tmp_path / "s").root / "sweep.json").read_text())
    contents.check_sweep(good)
    for wrong, said in (
        ({**good, "cells": [{**good["cells"][0], "id": "../x"}]}, r"cells\.0\.id"),
        ({**good, "env": {}}, r"env\.commit"),
        ([1], "valid dictionary"),
    ):
        with pytest.raises(contents.ContentError, match=said):
            contents.check_sweep(wrong)


def test_samples_of_a_million_rows_and_bootstraps_of_gigabytes_are_refused(tmp_path, monkeypatch):
    store = fixed_store(tmp_path / "s")
    cell = next(c for c in store.read_sweep()["cells"] if c["label"] == "none")["id"]
    monkeypatch.setattr(contents, "SAMPLES", 39)
    with pytest.raises(StoreError, match="more than 39 lines"):
        store.get(cell)
    with pytest.raises(vtc.VtcError, match="take too much memory: lower `bootstrap.resamples`"):
        stats.Bootstrap([str(i) for i in range(50_000)], resamples=100_000)
    assert 2 * 214_354 < 500_000, "room for the largest benchmark"


# ----------------------------------------------------------------------------------------------------------------- models
def test_a_config_of_endless_layers_or_of_nonsense_ends_in_a_sentence(refused, tmp_path, monkeypatch):
    assert inspect.MODULES < 10**6
    monkeypatch.setattr(inspect, "MODULES", 2000)  # as many as it has take some seconds
    good = json.loads((pocket_path() / "config.json").read_text())

    def check(text: str) -> str:
        (tmp_path / "config.json").write_text(text)
        start = time.monotonic()
        said = refused("check", tmp_path)
        assert time.monotonic() - start < 120
        return said

    text = {**good["text_config"], "num_hidden_layers": 10**9}
    assert "more than 2,000 modules" in check(json.dumps({**good, "text_config": text}))
    for change in (
        {"hidden_size": -4},
        {"hidden_size": "large"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": [1]},
        {"num_hidden_layers": 1.5},
    ):
        check(json.dumps({**good, "text_config": {**good["text_config"], **change}}))
    for change in ({"patch_size": 0}, {"image_size": None}, {"num_channels": "three"}):
        check(json.dumps({**good, "vision_config": {**good["vision_config"], **change}}))
    for whole in (
        "[]",
        "3",
        '"x"',
        "{",
        "[" * 100_000,
        '{"model_type": []}',
        '{"model_type": "llava", "text_config": 3}',
        "\0",
    ):
        check(whole)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    refused("check", tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert "has no config.json" in refused("check", tmp_path)


def test_settings_of_a_processor_that_are_none_give_no_count(tmp_path):
    shutil.copy(pocket_path() / "config.json", tmp_path)
    for text in ("[]", "3", "{", "[" * 100_000):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(UncountableError, match="image processor"):
            image_processor(str(tmp_path))


@pytest.mark.parametrize("name", ["meta", "cuda:99", "cpu:3", "", "warp", "vulkan", "hpu", "xla", "mkldnn", "lazy", "x" * 500])
def test_devices_that_are_not_there_or_do_not_compute(name):
    with pytest.raises(vtc.VtcError, match="is not available here"):
        inspect.device_named(name)
    assert inspect.device_named("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn", "bool", "nn", "", "__doc__", "complex64"])
def test_dtypes_that_models_do_not_run_in(name):
    with pytest.raises(vtc.VtcError, match="is not a floating point dtype"):
        inspect._dtype(name)
    assert inspect._dtype("half") is torch.float16


def test_a_damaged_model_folder_says_so(refused, picture, tmp_path):
    folder = tmp_path / "model"
    for name, data in (
        ("model.safetensors", b"\xff" * 100),
        ("tokenizer.json", b"{"),
        ("preprocessor_config.json", b"[]"),
        ("tokenizer_config.json", b"3"),
        ("model.safetensors", None),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pocket_path(), folder)
        (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
        refused("run", "--image", picture, "--prompt", "x", "--reducer", "fastv", "--keep", "9", "--model", folder)
        with pytest.raises(vtc.VtcError):
            models.load(config.ModelConfig(name=str(folder)))


# --------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    ("reducer", "option", "said"),
    [
        ("fastv", "layer=two", "layer='two' is not possible; use a whole number"),
        ("fastv", "layer=1.5", "layer=1.5 is not possible; use a whole number"),
        ("fastv", "layer=[1]", "is not possible; use a whole number"),
        ("fastv", 'layer={"a": 1}', "is not possible; use a whole number"),
        ("fastv", "layer=true", "layer=True is not possible; use a whole number"),
        ("fastv", f"layer={2**70}", "is too large"),
        ("fastv", f"layer={'9' * 5000}", "is not possible"),
        ("fastv", "layer=" + "[" * 5000, "is not possible"),
        ("fastv", "positions=1", "use one of original, compact"),
        ("random", f"seed={2**64}", "is too large"),
        ("random", "seed=x", "use a whole number"),
        ("globalcom2", "temperature=hot", "use a number"),
        ("globalcom2", "temperature=NaN", "temperature=nan is not a number"),
        ("cdpruner", "negate=maybe", "use true or false"),
        ("todre", "pivot=3", "use one of cls, random"),
        ("pyramiddrop", "layers=x", "use a list, each of it a whole number or a number"),
        ("pyramiddrop", 'layers=["x"]', "use a list"),
        ("sparsevlm", "version=7", "use one of 1, 1.5, 2"),
        ("docprune", "classifier=7", "docprune: classifier=7 is not possible"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_options_of_the_wrong_type(refused, picture, monkeypatch, command, reducer, option, said):
    monkeypatch.setattr("vtc.trial.trial", lambda *_, **__: pytest.fail("a model ran"))
    start = (
        ("check", "pocket", reducer)
        if command == "check"
        else ("run", "--image", picture, "--prompt", "x", "--reducer", reducer)
    )
    assert said in refused(*start, "--keep", "9", "-o", option)


def test_options_of_the_right_type_are_taken():
    assert vtc.create("sparsevlm", keep=0.5, version=2).version == "2"
    assert vtc.create("pyramiddrop", keep=0.5, layers=[0.25, 2, 0.75]).layers == (0.25, 2, 0.75)
    assert vtc.create("globalcom2", keep=0.5, temperature=7).temperature == 7
    assert vtc.create("docprune", keep=0.5, threshold=float("-inf")).threshold == float("-inf")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "pocket", "--image-size", "²x²"), "is not WxH"),
        (("check", "pocket", "--image-size", "9" * 5000 + "x1"), "is not WxH"),
        (("check", "pocket", "--image-size", "100000x100000"), "sides of 1 to"),
        (("check", "pocket", "fastv", "--keep", "9" * 5000), "is not a number: write tokens"),
        (("sweep", "FILE", "--shard", "1/" + "9" * 5000), "is not of the form I/N"),
        (("sweep", "FILE", "--shard", "²/²"), "is not of the form I/N"),
        (("tune", "pocket", "--reducers", "uniform", "--target-drop", "nan"), "the target nan"),
        (("tune", "pocket", "--reducers", "uniform", "--target-drop", "%"), "is not a number"),
        (("tune", "pocket", "--reducers", "uniform", "--target-drop", "1%", "--budgets", "1e999"), "budget"),
        (
            ("tune", "pocket", "--reducers", "uniform", "--target-drop", "1%", "--questions", "10000000000"),
            "ask for at most 12500",
        ),
        (("tune", "pocket", "--reducers", "", "--target-drop", "1%"), "name the reducers"),
        (("tune", "pocket", "--reducers", ",", "--target-drop", "1%"), "no reducer named ''"),
        (("tune", "", "--reducers", "uniform", "--target-drop", "1%"), "names no model"),
        (("check", ""), "there is no folder"),
        (("info", "."), "no reducer named ''"),
        (("info", "fastv.paper.x"), "no preset"),
    ],
)
def test_arguments_without_a_meaning(refused, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(SWEEP)
    assert said in refused(*(tmp_path / "s.yaml" if a == "FILE" else a for a in arguments))
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]


def test_a_result_is_printed_whatever_the_folder_is_called(call, tmp_path):
    target = tmp_path / "t[" / "x]"
    arguments = ("tune", "pocket", "--reducers", "uniform", "--budgets", "49", "--target-drop", "50%", "--questions", "8")
    code, out, err = call(*arguments, "--out", target)
    assert code == 0 and "uniform" in out and "x]" in "".join(err.split()) and "unexpected" not in err


def test_errors_that_are_not_ours_are_sentences(refused, monkeypatch):
    for error, said in (
        (OSError(28, "No space left on device", "/x/y"), "'/x/y' cannot be used (No space left on device)"),
        (MemoryError(), "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory of the device ran out"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("vtc.registry.info", fail)
        assert said in refused("info", "fastv")


@pytest.mark.parametrize("where", ["ascii", "closed", "full", "pipe"])
def test_any_standard_output_will_do(tmp_path, where):
    fixed_store(tmp_path / "store")
    command = f"{sys.executable} -m vtc table {tmp_path / 'store'} "
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"} if where == "ascii" else {**os.environ}
    tail = {"ascii": "", "closed": ">&-", "full": "> /dev/full", "pipe": "| true"}[where]
    done = subprocess.run(["bash", "-c", command + tail], capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr and "Exception ignored" not in done.stderr
    if where == "ascii":
        assert done.returncode == 0 and "random" in done.stdout and r"\u2013" in done.stdout
    elif where == "closed":
        assert done.returncode == 0 and done.stderr == ""
    elif where == "full":
        assert done.returncode == 1 and "No space left on device" in done.stderr and done.stderr.count("\n") == 1


def test_json_is_json_on_an_ascii_output(call, tmp_path, monkeypatch):
    worker = fake_executor().worker
    monkeypatch.setattr("vtc.eval.executors.Worker", lambda: worker)
    (tmp_path / "s.yaml").write_text(SWEEP + "model: {name: pocket, label: größer}\n")
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit):
        cli.main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "store"), "--json"])
    output.flush()
    assert json.loads(output.buffer.getvalue())["rows"][0]["model"] == "größer"


def test_the_bounds_are_where_the_docs_say():
    text = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    for value in (
        yamlfile.ENTRIES,
        yamlfile.DEPTH,
        config.MADE,
        cells.CELLS,
        questions.TABLE_ROWS,
        questions.TEXT,
        inspect.MODULES,
    ):
        assert f"{value:,}" in text, value


def test_an_unsupported_model_is_not_a_bug(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "from_the_future", "auto_map": {"AutoConfig": "x.Y"}}')
    (tmp_path / "x.py").write_text("raise SystemExit")
    assert "--trust-remote-code" in refused("check", tmp_path)
    with pytest.raises(UnsupportedModelError):
        inspect.load_config(str(tmp_path))
