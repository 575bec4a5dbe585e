"""Loads checkpoints without their data, by the code of the vLLM around it; no network, no GPU.

vLLM builds its model from the checkpoint's config.json and loads tensors of the right names,
shapes and dtypes that hold nothing (torch's meta device). So what is observed is its own matcher,
its own loader and its own parameters. A dispatch mode hears every copy into a parameter: which
tensor it came from, how many elements it filled, and whether dtypes were converted.

Runs beside the package ``inside`` (vllm_forge.kernels.selection.inside), which declares the GPU
and builds the models; standard library, torch and vLLM apart from that. Reads request.json beside
it, prints one JSON object as its last line and exits 0 if it could run at all.
"""

import importlib
import json
import os
import re
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "U64": "uint64", "U32": "uint32", "U16": "uint16",
}  # fmt: skip
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
ARGUMENTS = ("--kv-cache-dtype=fp8", "--max-model-len=4096", "--load-format=dummy")
DRAFT = ("mtp.", "model.mtp.")
WRITES = {"aten.copy_.default", "aten.fill_.Scalar", "aten.fill_.Tensor", "aten.zero_.default"}
COPY = "aten.copy_.default"
MOST_ROWS = 40

Facts = dict[str, Any]
Row = tuple[str, str, list[int]]


def main() -> None:
    """Answer for every case of the request, each in a child that has vLLM imported already."""
    asked = json.loads((HERE / "request.json").read_text())
    questions = importlib.import_module("inside.main")
    driver = importlib.import_module("inside.driver")
    declared = importlib.import_module("inside.device").DeclaredDevice
    os.environ |= questions.ALWAYS
    with tempfile.TemporaryDirectory() as folder:
        driver.build_stubs(Path(folder))
        declared(Path(folder)).declare(driver.Device(**asked["device"]))
        for name in (*questions.MODULES, *asked.get("modules", ())):
            importlib.import_module(name)
        registry: Any = importlib.import_module("vllm.model_executor.models.registry")
        # vLLM looks at a model's class in a fresh process, for CUDA's sake.
        registry._run_in_subprocess = lambda function: function()
        answers = {
            # Not by its name: vLLM takes "dspark" in a model's path for the method.
            case["name"]: _in_child(case, Path(folder, f"case-{number}"))
            for number, case in enumerate(asked["cases"])
        }
    print("\n" + json.dumps(answers), flush=True)
    os._exit(0)  # tearing torch down takes seconds and adds nothing


def _in_child(case: Facts, folder: Path) -> Facts:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            answer = _answer(case, folder)
        except Exception:  # noqa: BLE001 - a bug: reported to the host, as no verdict
            answer = {"fault": traceback.format_exc(limit=-4)}
        with os.fdopen(writer, "w") as out:
            json.dump(answer, out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else {"fault": "the process died"}


def _answer(case: Facts, folder: Path) -> Facts:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case["config"]))
    rows: list[Row] = json.loads((HERE / case["tensors"]).read_text())
    target = _load(folder, None, rows)
    drafts = {method: _load(folder, method, rows) for method in case["methods"]}
    return {"target": target, "drafts": drafts}


def _build(folder: Path, method: str | None) -> tuple[Any, Any]:
    """The model or, for a speculative method, the draft model, and its config; or why not."""
    serving = importlib.import_module("inside.serving")
    building = importlib.import_module("inside.building")
    arguments = list(ARGUMENTS)
    if method is not None:
        keys = json.loads((folder / "config.json").read_text())
        tokens = int(keys.get("dspark_block_size") or 1) if method == "dspark" else 1
        wanted = {"method": method, "num_speculative_tokens": tokens}
        arguments.append(f"--speculative-config={json.dumps(wanted)}")
    log = serving.attach_log()
    try:
        config = serving.make_config(str(folder), arguments)
    except serving.Refusal as refusal:
        return str(refusal), None
    with importlib.import_module("vllm.config").set_current_vllm_config(config):
        built = building.build_models(config, log)
    model = built.model if method is None else built.draft
    return model or str(built.refusal), config


def _load(folder: Path, method: str | None, rows: list[Row]) -> Facts:
    """Let vLLM build the model, and the model load the tensors; what it did with them."""
    model, config = _build(folder, method)
    if isinstance(model, str):
        return {"error": {"tensor": None, "message": model}}
    recorder = _recorder()
    error = None
    current = importlib.import_module("vllm.config").set_current_vllm_config
    # What the loaders ask the current config for is the one the model was built with.
    with current(config), recorder:
        try:
            model.load_weights(_tensors(rows, recorder))
        except Exception as raised:  # noqa: BLE001 - whatever a loader raises is the answer
            message = importlib.import_module("inside.serving").explain(raised)
            error = {"tensor": recorder.name, "message": message}
    return {
        "error": error,
        "read": len(recorder.read),
        "short": [] if error else _short(model, recorder),
        "casts": recorder.casts(),
        "unread": [] if error else _unread(rows, recorder, draft=method is not None),
        "modules": _modules(model),
    }


def _tensors(rows: Iterable[Row], recorder: Any) -> Iterator[tuple[str, Any]]:
    torch = importlib.import_module("torch")
    for name, dtype, shape in rows:
        tensor = torch.empty(shape, dtype=getattr(torch, DTYPES[dtype]), device="meta")
        recorder.name = name
        yield name, tensor
    recorder.name = None


def _recorder() -> Any:
    """A dispatch mode; its class needs torch, which the host may not have."""
    modes: Any = importlib.import_module("torch.utils._python_dispatch")

    class Recorder(modes.TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.name: str | None = None
            self.filled: Counter[int] = Counter()
            self.read: set[str] = set()
            self.seen: dict[tuple[str, str, str], list[str]] = defaultdict(list)

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if str(func) in WRITES and self.name is not None:
                to = args[0]
                self.filled[to.untyped_storage()._cdata] += to.numel()
                if str(func) == COPY:
                    self.read.add(self.name)
                    kind = (_name(args[1].dtype), _name(to.dtype), self.name.rpartition(".")[2])
                    self.seen[kind].append(self.name)
            return func(*args, **(kwargs or {}))

        def casts(self) -> list[Facts]:
            """Copies that converted: from, to, how often, one tensor; per suffix of the name."""
            return [
                {"from": source, "to": to, "count": len(names), "example": names[0]}
                for (source, to, _), names in sorted(self.seen.items())
                if source != to
            ]

    return Recorder()


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _short(model: Any, recorder: Any) -> list[Facts]:
    """Parameters of which not every element was written, alike ones in one row."""
    rows: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        filled = recorder.filled[parameter.untyped_storage()._cdata]
        if filled < parameter.numel():
            rows[NUMBER.sub("N", name), filled, parameter.numel()].append(name)
    return [
        {"parameter": names[0], "count": len(names), "filled": filled, "of": of}
        for (_, filled, of), names in list(rows.items())[:MOST_ROWS]
    ]


def _unread(rows: Iterable[Row], recorder: Any, *, draft: bool) -> list[Facts]:
    """Tensors of this model that nothing was copied from."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, _, _ in rows:
        if name not in recorder.read and name.startswith(DRAFT) == draft:
            groups[NUMBER.sub("N", name)].append(name)
    return [
        {"tensor": names[0], "count": len(names)} for names in list(groups.values())[:MOST_ROWS]
    ]


def _modules(model: Any) -> list[Facts]:
    """What vLLM made of every layer that can be quantized: its method, and its scheme."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or not hasattr(method, "create_weights"):
            continue
        scheme = getattr(module, "scheme", None)
        kinds = (type(method).__name__, "" if scheme is None else type(scheme).__name__)
        rows[(NUMBER.sub("N", name), *kinds)] += 1
    return [
        {"module": module, "method": method, "scheme": scheme, "count": count}
        for (module, method, scheme), count in rows.items()
    ]


if __name__ == "__main__":
    main()
