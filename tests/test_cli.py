"""The command line: what each command prints, its JSON, its exit codes, and that errors are one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import typer
from models import build
from PIL import Image

import vtc
from vtc import _window, cli, doctor, registry
from vtc.core import Need, Scorer, Stage
from vtc.inspect import examine, label
from vtc.trial import trial


@pytest.fixture
def call(capsys):
    """Run the command line; return exit code, standard output and standard error."""

    def go(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        code = stop.value.code
        return (0 if code is None else int(code)), out, err

    return go


@pytest.fixture(scope="module")
def pocket():
    return vtc.load_pocket()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (60, 90, 3), generator=generator, dtype=torch.uint8)
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(pixels.numpy()).resize((180, 120)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that hold nothing but a config."""
    out = {}
    for name in ("llava_next", "llava_siglip"):
        folder = tmp_path_factory.mktemp(name)
        build(name).config.save_pretrained(folder)
        assert [p.name for p in folder.iterdir()] == ["config.json"]
        out[name] = str(folder)
    return out


# --------------------------------------------------------------------------------------------------------------- list
def test_list_names_every_reducer(call):
    code, out, err = call("list")
    assert code == 0 and err == ""
    for name, entry in registry.entries().items():
        row = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert entry.paper in row and entry.stages[0] in row
    assert f"{len(registry.entries())} reducers" in out


def test_list_filters_by_pattern_and_stage(call):
    names = lambda *a: [row["name"] for row in json.loads(call("list", "--json", *a)[1])]  # noqa: E731
    assert names() == vtc.list_reducers()
    assert names("fast") == [n for n in vtc.list_reducers() if "fast" in n]
    assert names("f*v") == ["fastv"]
    assert names("--stage", "decoder") == [n for n, e in registry.entries().items() if "decoder" in e.stages]
    row = json.loads(call("list", "--json", "fastv")[1])[0]
    assert row["needs"] == ["last_attn"] and row["positions"] == "original" and row["kind"] == "score"


def test_list_filters_by_what_reducers_look_at(call):
    names = lambda *a: {row["name"] for row in json.loads(call("list", "--json", *a)[1])}  # noqa: E731
    asking = names("--text-aware")
    assert {"fastv", "cdpruner", "sparsevlm", "pyramiddrop"} <= asking
    assert not asking & {"visionzip", "divprune", "uniform", "fastervlm", "tome"}
    without = names("--no-attention")
    assert {"divprune", "cdpruner", "uniform", "downsample", "hierpool"} <= without
    assert not without & {"fastv", "visionzip", "pyramiddrop", "tome", "dart"}
    assert names("--text-aware", "--no-attention") == asking & without


def test_list_has_four_columns_unless_asked_for_all(call):
    assert call("list")[1].split("\n")[0].split() == ["name", "stages", "paper", "summary"]
    heading = call("list", "--all")[1].split("\n")[0].split()
    assert heading == ["name", "stages", "kind", "needs", "positions", "paper", "summary"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("list", "zzz"), "no reducer matches 'zzz'"), (("list", "--stage", "decode"), "did you mean 'decoder'")],
)
def test_list_refuses_what_does_not_exist(call, arguments, said):
    code, out, err = call(*arguments)
    assert code == 1 and out == "" and said in err


# --------------------------------------------------------------------------------------------------------------- info
@pytest.mark.parametrize("name", vtc.list_reducers())
def test_info_explains_every_reducer(call, name):
    code, out, _ = call("info", name)
    entry = registry.info(name)
    assert code == 0
    flat = " ".join(out.split())
    assert entry.summary.replace("``", "`") in flat and "**Deviates**:" in flat and entry.paper in flat
    for preset in entry.presets:
        assert f"{name}.{preset}" in out
        data = json.loads(call("info", f"{name}.{preset}", "--json")[1])
        assert data["preset"] == {"name": preset, **json.loads(json.dumps(entry.presets[preset]))}
    data = json.loads(call("info", name, "--json")[1])
    assert set(data["options"]) == {k for k in entry.options if k[0] != "_"} and data["doc"].startswith(entry.summary)


def test_info_suggests_names(call):
    code, _, err = call("info", "fastvv")
    assert code == 1 and "did you mean 'fastv'" in err
    code, _, err = call("info", "fastv.papr")
    assert code == 1 and "did you mean 'paper'" in err


def test_info_is_rendered_in_a_terminal(call, monkeypatch):
    monkeypatch.setattr(cli, "_console", lambda: cli.Console(force_terminal=True, width=100, no_color=True))
    code, out, _ = call("info", "fastv.paper")
    plain = re.sub(r"\x1b(\[[0-9;]*m|\]8;[^\x1b]*\x1b\\)", "", out)  # colours and links
    assert code == 0 and "**" not in plain and "fastv.paper: layer=2, keep=0.5 (chosen)" in plain
    assert max(len(line.rstrip()) for line in plain.splitlines()) <= 100


# -------------------------------------------------------------------------------------------------------------- check
def test_check_reads_the_structure_from_the_config(call, pocket):
    code, out, _ = call("check", "pocket", "--json")
    data = json.loads(out)
    config = pocket[0].config
    assert code == 0
    assert data["decoder"]["layers"] == config.text_config.num_hidden_layers
    assert data["tower"]["layers"] == config.vision_config.num_hidden_layers and data["tower"]["cls"]
    assert data["visual_tokens"] == config.image_seq_length == 196 and data["tower"]["grid"] == [14, 14]
    assert set(data["stages"]) == {s.value for s in Stage} and set(data["reducers"]) == set(vtc.list_reducers())
    code, out, _ = call("check", "pocket")
    assert code == 0 and "14x14 tokens" in out and "with class token" in out


@pytest.mark.parametrize("size", [(56, 30), (30, 56), (20, 20)])
def test_check_counts_anyres_tokens_as_the_model_does(call, folders, size):
    from models import make_inputs, visual_of

    width, height = size
    data = json.loads(call("check", folders["llava_next"], "--image-size", f"{width}x{height}", "--json")[1])
    model = build("llava_next")
    inputs = make_inputs("llava_next", model, sizes=[[height, width]])
    assert data["visual_tokens"] == int(visual_of(inputs).sum())
    assert data["image_size"] == [width, height] and data["anyres"]


def test_check_says_why_a_reducer_does_not_run(call, folders, temporary):
    code, out, _ = call("check", folders["llava_siglip"])
    assert code == 0 and "without class token" in out
    assert f"not {temporary}: '{temporary}': signal 'cls_attn' needs 'cls'" in out
    data = json.loads(call("check", folders["llava_siglip"], "--json")[1])
    assert data["reducers"]["uniform"] == "" and "needs 'cls'" in data["reducers"][temporary]
    served = sum(not reason for reason in data["reducers"].values())
    assert f"{served} of {len(vtc.list_reducers())}: " in out and served < len(vtc.list_reducers())
    assert examine("pocket").reducers[temporary] == ""  # this tower has a class token


@pytest.fixture
def temporary():
    """A reducer that works only with a class token."""
    from vtc.signals import cls_attn

    @registry.register("only_cls", paper="baseline")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OnlyCls(Scorer):
        """Test."""

        stage: ClassVar[Stage] = Stage.BOUNDARY

        @property
        def needs(self) -> tuple[Need, ...]:
            return (cls_attn(-2, substitute=False),)

    yield "only_cls"
    registry.unregister("only_cls")


def test_check_answers_for_one_reducer(call, folders, temporary):
    code, out, _ = call("check", "pocket", "fastv.k3-r75")
    assert code == 0 and "yes" in out and "196 visual tokens -> 49" in out
    code, out, err = call("check", "pocket", "fastv", "-o", "layer=9")
    assert code == 1 and out == "" and "use 1..5" in err
    code, _, err = call("check", folders["llava_siglip"], temporary)
    assert code == 1 and "these reducers work here" in err and "uniform" in err
    code, out, _ = call("check", folders["llava_siglip"], temporary, "--json")
    assert code == 1 and json.loads(out)["asked"]["runs"] is False


# ---------------------------------------------------------------------------------------------------------------- run
QUESTION = "what color is the big shape?"


def test_run_prints_both_answers_times_and_tokens(call, pocket, picture, tmp_path):
    target = tmp_path / "kept.png"
    code, out, _ = call(
        *("run", "--image", picture, "--prompt", QUESTION, "--reducer", "fastv.k3-r75", "--keep", "49"),
        *("--runs", "2", "--max-new-tokens", "3", "--show", str(target), "--json"),
    )
    data = json.loads(out)
    assert code == 0
    assert data["reducer"] == "fastv(keep=49, layer=3)"
    assert data["tokens"]["tokens_per_layer"] == [196, 196, 196, 49, 49, 49] and data["tokens"]["avg_tokens"] == 122.5
    # the answers are those of plain generate
    model, processor = pocket
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(picture).convert("RGB")], return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with vtc.patch(model, "fastv", keep=49, layer=3):
        short = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    start = inputs["input_ids"].shape[1]
    for side, output in (("before", plain), ("after", short)):
        assert data[side]["answer"] == processor.batch_decode(output[:, start:], skip_special_tokens=True)[0].strip() != ""
        assert data[side]["new_tokens"] == output.shape[1] - start
        for clock in ("ttft_ms", "total_ms"):
            assert 0 < data[side][clock]["min"] <= data[side][clock]["median"] <= data[side][clock]["max"]
    assert data["before"]["reducer_ms"] == 0 < data["after"]["reducer_ms"]
    assert data["conditions"]["runs"] == 2 and "float32" in data["conditions"]["text"]
    assert Image.open(target).size[0] > 400


def test_run_table_and_composition(call, picture):
    code, out, _ = call(
        *("run", "--image", picture, "--prompt", QUESTION, "--reducer", "divprune", "--reducer", "fastv"),
        *("--keep", "0.5", "--runs", "1", "--max-new-tokens", "2"),
    )
    assert code == 0
    assert "divprune(keep=0.5) + fastv(keep=0.5) on pocket" in out
    for row in ("answer", "time to first token", "whole answer", "visual tokens, last layer", "visual tokens, layer average"):
        assert row in out
    assert "divprune at boundary: 196 -> 98 tokens" in out and "fastv at decoder 2: 98 -> 98 tokens" in out


def test_trial_leaves_the_model_as_it_was(pocket, picture):
    model, processor = pocket
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    outcome = trial(model, processor, Image.open(picture), QUESTION, vtc.create("uniform", keep=20), max_new_tokens=2, runs=3)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert len(outcome.before.ttft_ms) == len(outcome.after.total_ms) == 3  # the warm-up is not counted
    assert outcome.image.kept == len(outcome.kept.entries) == 20


def test_label():
    assert label(vtc.create("fastv", keep=64)) == "fastv(keep=64)"
    assert label(vtc.create("fastv.k3-r75")) == "fastv(keep=0.25, layer=3)"


def test_options_are_read_as_json():
    read = [cli._value(t) for t in ("3", "0.5", "true", "False", "null", "[1, 2]", "compact", "1e-2")]
    assert read == [3, 0.5, True, False, None, (1, 2), "compact", 0.01]
    assert [type(cli._amount("keep", t)) for t in ("64", "0.5", "1.0")] == [int, float, float]


@pytest.mark.parametrize(
    ("text", "means"),
    [("64", 64), ("0.25", 0.25), ("25%", 0.25), (" 25 % ", 0.25), ("1", 1), ("100%", 1.0), (64, 64), (0.25, 0.25)],
)
def test_a_budget_means_the_same_wherever_it_is_given(text, means):
    from vtc.eval.lmms.model import build
    from vtc.eval.sweepfile import parse_sweep

    def same(amount):
        return amount == means and type(amount) is type(means)

    assert same(vtc.create("fastv", keep=text).keep) and same(vtc.create("fastv", avg_tokens=text).avg_tokens)
    assert same(cli._reducer(["fastv"], str(text), "", None).keep)
    assert same(build({"pretrained": "pocket", "reducer": "fastv", "keep": text}).reducer.keep)
    (budget,) = parse_sweep(f"model: pocket\nreducers: [fastv]\nbudgets: [{text}]\ndata: {{scenes: {{n: 9}}}}").budgets
    assert same(budget.keep)


@pytest.mark.parametrize("text", ["x", "25%%", "%", "1/4", "quarter", ""])
def test_a_budget_that_is_no_number_says_how_to_write_one(text):
    with pytest.raises(vtc.BudgetError, match="is not a number: use tokens, as in 64, or a share, as in 0.25 or 25%"):
        vtc.create("fastv", keep=text)


@pytest.mark.parametrize("keep", ["0", "0%", "101%", "-3"])
def test_refused_budgets_are_called_by_their_option(call, picture, keep):
    for arguments in (("check", "pocket", "fastv"), ("run", picture, QUESTION)):
        code, _, err = call(*arguments, f"--keep={keep}")
        assert code == 1 and err.startswith("error: --keep ") and "keep=" not in err and err.count("\n") == 1


def test_run_takes_image_and_question_by_place_and_has_defaults(call, picture, tmp_path):
    target = tmp_path / "new" / "folder" / "kept.png"
    code, out, err = call("run", picture, QUESTION, "--runs", "1", "--max-new-tokens", "1", "--show", str(target))
    assert code == 0 and "visionzip(keep=0.25) on pocket" in out and target.exists()
    assert err == "note: 'pocket' knows generated scenes only; for photos give --model\n"
    code, out, err = call("run", "results/scene.png", QUESTION, "--runs", "1", "--max-new-tokens", "1")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("arguments", [(), ("a.png",), ("a.png", "x", "y"), ("a.png", "x", "--prompt", "y")])
def test_run_without_both_or_with_more_is_wrong_usage(call, arguments):
    code, out, err = call("run", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and "(see vtc run --help)" in err


def test_check_tries_the_share_that_run_takes(call):
    assert "yes, fastv(keep=0.25) runs on pocket: 196 visual tokens -> 49" in call("check", "pocket", "fastv")[1]


# ------------------------------------------------------------------------------------------------------------- doctor
def test_doctor_is_content_here(call):
    code, out, _ = call("doctor", "--json")
    data = json.loads(out)
    found = {f["what"]: f for f in data["findings"]}
    assert code == 0 and data["ok"], [f for f in data["findings"] if f["state"] == "problem"]
    assert found["reducers"]["text"].startswith(f"{len(vtc.list_reducers())}: ")
    assert found["pocket model"]["state"] == "ok"
    assert found["lmms-eval plugin"]["state"] == "ok" and "on 49 of 196 tokens" in found["lmms-eval plugin"]["text"]
    for name in _window.TESTED:  # the newest of all is tried, too (`make newest`): a note then, where the lock has none
        assert found[name]["state"] == ("note" if _window.outside(name) else "ok"), name


def test_doctor_says_that_everything_works(call, monkeypatch):
    monkeypatch.setattr(doctor, "_lmms", lambda: iter(()))
    code, out, _ = call("doctor")
    assert code == 0 and "everything works" in out


@pytest.mark.parametrize(("version", "state"), [("4.56.2", "problem"), ("4.57.0", "ok"), ("5.24.3", "ok"), ("6.0.0", "note")])
def test_doctor_says_whether_a_version_is_inside_the_window(monkeypatch, version, state):
    monkeypatch.setattr(_window, "installed", lambda name: version if name == "transformers" else "1.0")
    (found,) = [f for f in doctor._versions() if f.what == "transformers"]
    assert found.state == state and version in found.text and "4.57 to 5.24" in found.text
    assert ("pip install 'transformers>=4.57,<5.25'" in found.text) == (state != "ok")


def test_doctor_imports_what_it_calls_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = {f.what: f for f in doctor._optional()}
    assert found["matplotlib"].state == "problem" and "cannot be imported (ModuleNotFoundError" in found["matplotlib"].text


def test_doctor_finds_an_lmms_eval_that_breaks_while_it_evaluates(monkeypatch):
    """All of it can be imported then; only an evaluation meets the module that is gone."""
    from vtc.eval.lmms import run

    def gone(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'filelock._api'")

    monkeypatch.setattr(run, "run_task", gone)
    (found,) = doctor._lmms()
    assert found.state == "problem" and "No module named 'filelock._api'" in found.text
    installed = _window.installed
    monkeypatch.setattr(_window, "installed", lambda name: "4.3.1" if name == "filelock" else installed(name))
    (found,) = doctor._lmms()
    assert found.state == "problem" and found.text.endswith("pip install 'filelock>=3.20,<4.3'")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    (found,) = doctor._lmms()
    assert found.state == "problem" and "not registered" in found.text


def test_doctor_survives_a_crashing_check(call, monkeypatch):
    def crash():
        raise RuntimeError("no weights")

    monkeypatch.setattr("vtc.load_pocket", crash)
    monkeypatch.setattr(doctor, "_lmms", lambda: iter(()))
    code, out, _ = call("doctor")
    assert code == 1 and "RuntimeError: no weights" in out and "2 problems found" in out


def test_doctor_sees_our_kernels_folder_posing_as_kernels(monkeypatch, tmp_path):
    import vtc.kernels

    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = doctor._kernels_package()
    assert finding.state == "note" and "not Hugging Face's" in finding.text
    monkeypatch.setattr(vtc.kernels, "__file__", str(package / "__init__.py"))
    (finding,) = doctor._kernels_package()
    assert finding.state == "note" and "use `python -P`" in finding.text
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.12.0")  # now it would hide the real one
    (finding,) = doctor._kernels_package()
    assert finding.state == "problem"


def test_doctor_reports_missing_and_broken_commands(monkeypatch):
    def broken():
        raise ImportError("gone")

    for points, said in (
        ([], "are not registered"),
        ([_point("x", broken)], "'x:register' cannot be loaded (ImportError: gone)"),
    ):
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group, points=points: points)
        (finding,) = doctor._commands()
        assert finding.state == "problem" and said in finding.text and "reinstall" in finding.text


def test_doctor_names_missing_extras(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "matplotlib" else "1.0")
    findings = {f.what: f for f in doctor._extras()}
    assert findings["extra plot"].state == "note" and "pip install 'vtc-reducers[plot]'" in findings["extra plot"].text
    assert findings["extra eval"].state == "ok"


# ------------------------------------------------------------------------------------------------------------- plugins
def _point(name, load):
    return SimpleNamespace(name=name, value=f"{name}:register", dist=SimpleNamespace(name="third-party"), load=load)


def test_plugins_add_commands_and_a_broken_one_costs_one_line(monkeypatch, capsys):
    def good():
        return lambda target: target.command("extra")(lambda: print("extra ran"))

    def broken():
        raise ImportError("no module named 'gone'")

    app = typer.Typer()
    app.command("first")(lambda: None)
    points = [_point("broken", broken), _point("good", good)]
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: points if group == cli.COMMANDS else entry_points(group=group)
    )
    cli.load_plugins(app)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "'broken' of third-party" in err and "no module named 'gone'" in err
    with pytest.raises(SystemExit) as stop:
        typer.main.get_command(app).main(args=["extra"])
    assert not stop.value.code and "extra ran" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- errors
def test_errors_are_one_sentence_without_traceback(call):
    code, out, err = call("info", "nosuch")
    assert code == 1 and out == ""
    assert err.startswith("error: no reducer named 'nosuch'") and err.count("\n") == 1 and "Traceback" not in err


def test_debug_shows_the_traceback():
    for arguments in (["--debug", "info", "nosuch"], ["info", "nosuch", "--debug"]):
        with pytest.raises(vtc.UnknownReducerError):
            cli.main(arguments)


def test_a_bug_says_how_to_report_it(call, monkeypatch):
    def crash(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("vtc.registry.info", crash)
    code, _, err = call("info", "fastv")
    assert code == 1 and err.startswith("error: ZeroDivisionError: oops") and "--debug" in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", "fastv", "--debug"])


@pytest.mark.parametrize("arguments", [("nosuch",), ("run", "--image", "x.png"), ("list", "--nosuch"), ("run", "--runs", "0")])
def test_wrong_usage_exits_with_2(call, arguments):
    assert call(*arguments)[0] == 2


def test_version(call):
    assert call("--version")[:2] == call("-V")[:2] == (0, vtc.__version__ + "\n")


@pytest.mark.parametrize(("arguments", "code"), [(("list",), 0), (("--help",), 0), (("check", "pocket", "fastv"), 0)])
def test_a_reader_that_has_had_enough_changes_no_exit_code(arguments, code):
    """As in `vtc ... | head -1`, and nothing is said about it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run([sys.executable, "-m", "vtc", *arguments], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, "")


def test_shells_can_complete_the_commands(call):
    code, out, _ = call("--show-completion", "bash")
    assert code == 0 and "_VTC_COMPLETE" in out


def test_python_m_vtc_is_quick():
    """Help, list and info, plugins included, import neither transformers nor the evaluation's heavy dependencies."""
    code = (
        "import contextlib, io, runpy, sys\n"
        "for arguments in (['--help'], ['list'], ['info', 'fastv'], ['--version']):\n"
        "    sys.argv = ['vtc', *arguments]\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        try: runpy.run_module('vtc', run_name='__main__')\n"
        "        except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'transformers', 'triton', 'lmms_eval', 'matplotlib', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(out.getvalue())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == vtc.__version__
