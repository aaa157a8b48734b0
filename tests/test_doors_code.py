"""Whose code runs, and who is talked to: model folders, sweep files, attention names, plugins, the network, Ray."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from PIL import Image

import vtc
from vtc import cli, inspect
from vtc.errors import ConfigError, UnsupportedModelError
from vtc.eval import models
from vtc.eval.config import ModelConfig, SweepConfig
from vtc.eval.sweepfile import load_sweep, parse_sweep
from vtc.pocket import pocket_path

ROOT = Path(__file__).resolve().parent.parent
SWEEP = "data: {scenes: {n: 6}}\nbudgets: [49]\nreducers: [fastv]\nspeed: false\nthreads: 1\n"


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command line as somebody who says yes to everything; return exit code, output, and error output."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    def go(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return go


# --------------------------------------------------------------------------------------------------------- code of models
HOSTILE = (
    "import pathlib\npathlib.Path({flag!r}).touch()\nfrom transformers import {base}\nclass Hostile({base}):\n    {body}\n"
)


@pytest.fixture
def flag(tmp_path, monkeypatch):
    """A file that a model's code leaves behind when it runs."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "it-ran"


def hostile(folder: Path, flag: Path, where: str) -> Path:
    """The embedded model with Python of its own, named in one of its files."""
    shutil.copytree(pocket_path(), folder)
    base, body = {
        "config.json": ("LlavaConfig", "model_type = 'hostile'"),
        "preprocessor_config.json": ("CLIPImageProcessor", "pass"),
        "processor_config.json": ("LlavaProcessor", "pass"),
        "tokenizer_config.json": ("PreTrainedTokenizerFast", "pass"),
    }[where]
    auto = {
        "config.json": "AutoConfig",
        "preprocessor_config.json": "AutoImageProcessor",
        "processor_config.json": "AutoProcessor",
        "tokenizer_config.json": "AutoTokenizer",
    }[where]
    (folder / "hostile.py").write_text(HOSTILE.format(flag=str(flag), base=base, body=body))
    path = folder / where
    data = json.loads(path.read_text()) if path.exists() else {}
    value = ["hostile.Hostile", None] if auto == "AutoTokenizer" else "hostile.Hostile"
    data["auto_map"] = {auto: value}
    if where == "config.json":
        data["model_type"] = "hostile"
    for key in ("processor_class", "image_processor_type", "tokenizer_class"):
        if key in data:
            data[key] = "Hostile"
    path.write_text(json.dumps(data))
    return folder


PLACES = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("command", ["check", "run", "sweep", "tune"])
def test_no_command_runs_the_code_of_a_model_folder_even_if_stdin_says_yes(call, tmp_path, flag, where, command):
    folder = hostile(tmp_path / "model", flag, where)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "s.yaml").write_text(SWEEP + f"model: {folder}\n")
    arguments = {
        "check": ("check", folder),
        "run": ("run", "--image", tmp_path / "a.png", "--prompt", "x", "--reducer", "fastv", "--keep", 9, "--model", folder),
        "sweep": ("sweep", tmp_path / "s.yaml", "--out", tmp_path / "store"),
        "tune": ("tune", folder, "--reducers", "fastv", "--target-drop", "5%", "--questions", 4, "--out", tmp_path / "store"),
    }[command]
    code, _, err = call(*arguments)
    assert not flag.exists(), f"code of the model ran ({where})"
    assert "unexpected" not in err and "Traceback" not in err
    if where == "config.json" and command != "sweep":
        assert code == 1 and "needs Python code" in err and "--trust-remote-code" in err


def test_the_flag_on_the_command_line_lets_the_code_of_a_model_run(call, tmp_path, flag):
    folder = hostile(tmp_path / "model", flag, "config.json")
    call("check", folder, "--trust-remote-code")
    assert flag.exists()


def test_the_flag_reaches_every_model_of_a_sweep_and_its_address(tmp_path):
    (tmp_path / "s.yaml").write_text(SWEEP + "models: [pocket, pocket-next]\n")
    plain, trusting = (load_sweep(tmp_path / "s.yaml", trust_remote_code=t) for t in (False, True))
    assert [m.trusted for m in plain.all_models] == [False, False] and [m.trusted for m in trusting.all_models] == [True, True]
    assert models.identity(plain.all_models[0]) != models.identity(trusting.all_models[0])
    assert plain.all_models[0] != trusting.all_models[0], "a worker loads the model again"
    assert not SweepConfig.model_validate(trusting.model_dump()).all_models[0].trusted, "a record does not carry it"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("model: {name: pocket, processor: {trust_remote_code: true}}", ("model.processor.trust_remote_code", "unknown key")),
        ("model: {name: pocket, processor: {revision: main}}", ("model.processor.revision", "unknown key")),
        ("model: {name: pocket, processor: {max_pixel: 9}}", ("model.processor.max_pixel", "did you mean 'max_pixels'")),
        ("model: {name: pocket, processor: {max_pixels: many}}", ("model.processor.max_pixels", "integer")),
        ("model: {name: pocket, trust_remote_code: true}", ("model.trust_remote_code", "unknown key")),
        ("model: {name: pocket, _trusted: true}", ("model._trusted", "unknown key")),
        ("models: [{name: pocket, attention: org/kernel}]", ("models[0].attention", "code from the hub is not run")),
        ("model: {name: pocket, attention: 'org/kernel:f'}", ("model.attention", "code from the hub is not run")),
        ("model: {name: pocket, attention: spda}", ("no attention implementation 'spda'", "did you mean 'sdpa'")),
        ("model: {name: pocket, revision: ../../x}", ("model.revision", "branch")),
        ("model: {name: pocket, device: meta}", ("model.device", "meta")),
        ("model: {name: 'a b/c'}", ("neither a folder nor a name that the hub has",)),
    ],
)
def test_a_sweep_file_cannot_ask_for_code(line, parts):
    with pytest.raises(ConfigError) as caught:
        parse_sweep(SWEEP + line, source="s.yaml")
    for part in parts:
        assert part in str(caught.value)


def test_the_allowed_processor_settings_reach_the_processor(monkeypatch):
    import transformers

    seen = {}
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda place, **given: seen.update(given))
    config = parse_sweep(SWEEP + f"model: {{name: {pocket_path()}, processor: {{min_pixels: 784, max_pixels: 1000}}}}\n")
    models.load_processor(config.all_models[0])
    assert seen == {"trust_remote_code": False, "min_pixels": 784, "max_pixels": 1000}


@pytest.mark.parametrize("inner", [False, True])
def test_a_config_cannot_reach_for_a_kernel_of_the_hub(call, tmp_path, monkeypatch, inner):
    """Whatever transformers makes of the key when it reads the file: what it ends in is looked at."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(pocket_path(), trust_remote_code=False)
    at = config.text_config if inner else config
    at._attn_implementation = "org/kernel"
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    with pytest.raises(UnsupportedModelError, match=r"'org/kernel', code from the hub"):
        inspect.load_config("pocket")


def trusting_calls(source: str) -> list[ast.Call]:
    return [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ("from_pretrained", "from_config")
    ]


def test_every_loading_call_says_whether_code_is_trusted():
    found = 0
    for path in [*ROOT.glob("vtc/**/*.py"), *ROOT.glob("eval/**/*.py")]:
        for call in trusting_calls(path.read_text(encoding="utf-8")):
            (given,) = [k.value for k in call.keywords if k.arg == "trust_remote_code"] or [None]
            assert given is not None, f"{path.name}:{call.lineno} leaves trust_remote_code out: transformers would ask"
            if isinstance(given, ast.Constant):
                assert given.value is False, f"{path.name}:{call.lineno}"
            else:  # what the caller was told, never a value from a file
                assert ast.unparse(given) in ("trust_remote_code", "trusted", "model.trusted"), f"{path.name}:{call.lineno}"
            found += 1
    assert found >= 10
    assert trusting_calls("A.from_pretrained(x)\nB.y.from_config(c)")


def test_every_picture_is_opened_with_a_list_of_formats():
    for path in [*ROOT.glob("vtc/**/*.py"), *ROOT.glob("eval/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert any(k.arg == "formats" for k in node.keywords), f"{path.name}:{node.lineno}"


# ------------------------------------------------------------------------------------------------------------ the network
@pytest.fixture
def no_network(monkeypatch):
    """Hugging Face believes to be online, and every look-up of a name is noted."""
    import huggingface_hub.constants
    import transformers.utils.hub

    asked: list[object] = []

    def look_up(*address: object, **_: object) -> object:
        asked.append(address[0])
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)
    if hasattr(huggingface_hub.utils, "_detect_agent"):  # looked up once per process
        monkeypatch.setattr(huggingface_hub.utils._detect_agent, "_registry", None)
        monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", "/nowhere/at/all")
    return asked


@pytest.mark.parametrize("command", ["check", "run", "sweep --dry-run"])
def test_what_says_that_it_touches_no_network_does_not(call, tmp_path, no_network, command):
    name = "nobody/has-this-model"
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "s.yaml").write_text(SWEEP + f"model: {name}\n")
    code, out, err = call(
        *{
            "check": ("check", name),
            "run": ("run", "--image", tmp_path / "a.png", "--prompt", "x", "--reducer", "fastv", "--keep", 9, "--model", name),
            "sweep --dry-run": ("sweep", tmp_path / "s.yaml", "--out", tmp_path / "s", "--dry-run"),
        }[command]
    )
    assert no_network == []
    assert "no model 'nobody/has-this-model' here" in out + err


def test_a_model_that_cannot_be_had_is_refused_before_anything_runs(call, tmp_path, monkeypatch):
    monkeypatch.setattr("vtc.eval.worker.Worker.run", None)
    for name, said in (("nobody/has-this-model", "hub cannot be reached"), (str(tmp_path / "empty"), "holds no weights")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        shutil.copy(pocket_path() / "config.json", tmp_path / "empty")
        (tmp_path / "s.yaml").write_text(SWEEP + f"model: {name}\n")
        code, _, err = call("sweep", tmp_path / "s.yaml", "--out", tmp_path / "store")
        assert code == 1 and said in err and err.count("\n") == 1
        assert not (tmp_path / "store").exists()


def test_a_worker_does_not_load_a_model_twice_that_it_could_not_load(monkeypatch):
    from vtc.eval.run import Sweep
    from vtc.eval.worker import Worker

    tried = []

    def load(model: ModelConfig, planned: object) -> None:
        tried.append(model.name)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(models, "load", load)
    sweep, worker = Sweep(parse_sweep(SWEEP)), Worker()
    said = {worker.run(sweep.job(p, "accuracy")).error for p in sweep.planned[:3]}
    assert tried == ["pocket"] and all("RuntimeError: out of luck" in error for error in said)


# ---------------------------------------------------------------------------------------------------------------- plugins
def test_a_plugin_that_ends_the_program_costs_one_line(monkeypatch, capsys):
    def leaving():
        sys.exit(0)

    def half(target: typer.Typer) -> None:
        target.command("half")(lambda: None)
        raise SystemExit(0)

    points = [
        SimpleNamespace(name=name, value=f"{name}:register", dist=SimpleNamespace(name="third-party"), load=load)
        for name, load in (("leaving", leaving), ("half", lambda: half))
    ]
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: points if group == cli.COMMANDS else entry_points(group=group)
    )
    app = typer.Typer()
    app.command("first")(lambda: print("first ran"))
    app.command("second")(lambda: None)
    cli.load_plugins(app)
    err = capsys.readouterr().err
    assert err.count("\n") == 2 and err.count("tried to end the program") == 2 and "reinstall or remove third-party" in err
    with pytest.raises(SystemExit):
        typer.main.get_command(app).main(args=["first"])
    assert "first ran" in capsys.readouterr().out
    assert [c.name for c in app.registered_commands] == ["first", "second"], "nothing half done is left of a plugin"


def test_broken_plugins_leave_the_commands_working(tmp_path):
    """From outside: a package whose reducers raise, one that exits, one whose commands exit."""
    (tmp_path / "hostile_plugin.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "raising_plugin.py").write_text("raise ValueError('first line\\nsecond line')\n")
    info = tmp_path / "hostile_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vtc.commands]\na = hostile_plugin:register\n[vtc.reducers]\nb = hostile_plugin\nc = raising_plugin\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "vtc", "list", "fastv"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0 and "arXiv" in done.stdout
    assert done.stderr.count("hostile-plugin") >= 3 and "Traceback" not in done.stderr and "unexpected" not in done.stderr


# -------------------------------------------------------------------------------------------------------------------- Ray
LISTENING = """
import json, psutil
from vtc.eval.executors import RayActors
executor = RayActors(1)
try:
    asked = executor.ray.get(executor.ray.remote(lambda: __import__("os").environ.get("RAY_AUTH_MODE")).remote())
    found = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        found += [c.laddr.ip for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    print("FOUND", json.dumps({"addresses": sorted(set(found)), "auth": asked}))
finally:
    executor.close()
"""


@pytest.mark.slow
def test_a_ray_started_here_listens_to_this_machine_only(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[6:])
    assert found["addresses"] and {a.removeprefix("::ffff:") for a in found["addresses"]} <= {"127.0.0.1", "::1"}
    assert found["auth"] == "token"
    assert not (tmp_path / ".ray").exists(), "the token of a run is not left in the home folder"


def test_vtc_exports_the_errors_of_its_doors():
    assert issubclass(vtc.InputFileError, (vtc.VtcError, OSError)) and issubclass(vtc.PromptError, ValueError)
