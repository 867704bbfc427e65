"""Everything of vLLM's internals that the product uses, checked in the sources of a wheel without importing them.

`python -m tests.serve.engine.vllm_contract WHEEL|DIR` checks another version than the installed one: WHEEL is a wheel
file or an unpacked one. It prints what has changed and exits with 1, or says that nothing has.

Imports, the calls of imported names, command-line flags, environment variables and parsers are read from our own
sources. What we do with vLLM's objects (methods, attributes) stands in the tables below.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from slimserve.serve.launch.parsers import REASONING_RULES, TOOL_RULES

ROOT = Path(__file__).parents[3]
ROOMS = ("core", "compress", "serve", "compare", "loadtest", "distill", "benches")
_LLM = "vllm.v1.engine.async_llm.AsyncLLM"
_SERVING = "vllm.entrypoints.openai.models.serving.OpenAIServingModels"
METHODS = (
    # method, number of positional arguments without self, keyword arguments, file that calls it
    ("vllm.engine.arg_utils.AsyncEngineArgs.from_cli_args", 1, "", "serve/engine/entry.py"),
    ("vllm.engine.arg_utils.AsyncEngineArgs.create_engine_config", 0, "usage_context", "serve/engine/entry.py"),
    (
        f"{_LLM}.from_vllm_config",
        1,
        "usage_context enable_log_requests aggregate_engine_logging disable_log_stats",
        "serve/engine/entry.py",
    ),
    (f"{_LLM}.reset_mm_cache", 0, "", "serve/engine/entry.py"),
    (f"{_LLM}.shutdown", 0, "timeout", "serve/engine/entry.py"),
    ("vllm.v1.engine.utils.get_mp_context", 0, "", "serve/engine/entry.py"),
    (f"{_LLM}.generate", 3, "lora_request priority", "serve/engine/plugin.py"),
    ("vllm.config.model.ModelConfig.get_vocab_size", 0, "", "serve/engine/plugin.py"),
    (f"{_SERVING}.is_base_model", 1, "", "serve/engine/plugin.py"),
    (f"{_SERVING}.model_name", 0, "", "serve/engine/plugin.py"),
    ("vllm.v1.core.kv_cache_manager.KVCacheManager.get_block_ids", 1, "", "serve/engine/partial_prefix.py"),
    (
        "vllm.model_executor.layers.logits_processor.LogitsProcessor.forward",
        3,
        "skip_gather",
        "serve/engine/label_logits.py",
    ),
    (
        "vllm.model_executor.kernels.linear.scaled_mm.cpu.CPUInt8ScaledMMLinearKernel._apply_weights_sgl",
        3,
        "",
        "serve/engine/gemm.py",
    ),
    ("vllm.entrypoints.pooling.scoring.serving.ServingScores.__call__", 2, "", "serve/engine/classifier.py"),
    (
        "vllm.entrypoints.pooling.scoring.protocol.ScoreQueriesDocumentsRequest",
        0,
        "model queries documents",
        "serve/engine/classifier.py",
    ),
    (
        "vllm.entrypoints.pooling.scoring.protocol.RerankRequest",
        0,
        "model query documents max_tokens_per_doc",
        "serve/engine/classifier.py",
    ),
)
ATTRIBUTES = (
    ("vllm.config.model.ModelConfig", "max_model_len model runner_type", "serve/engine/plugin.py"),
    (
        "vllm.config.vllm.VllmConfig",
        "kv_transfer_config model_config cache_config shutdown_timeout",
        "serve/engine/plugin.py",
    ),
    (_SERVING, "lora_requests base_model_paths", "serve/engine/plugin.py"),
    ("vllm.outputs.RequestOutput", "outputs num_cached_tokens", "serve/engine/plugin.py"),
    ("vllm.outputs.CompletionOutput", "logprobs", "serve/engine/plugin.py"),
    (
        "vllm.v1.request.Request",
        "request_id prompt_token_ids num_prompt_tokens num_computed_tokens lora_request kv_transfer_params "
        "block_hashes cache_salt",
        "serve/engine/partial_prefix.py",
    ),
    ("vllm.v1.core.sched.output.SchedulerOutput", "num_scheduled_tokens", "serve/engine/partial_prefix.py"),
    (
        "vllm.model_executor.layers.logits_processor.LogitsProcessor",
        "soft_cap scale logits_as_input",
        "serve/engine/label_logits.py",
    ),
    (
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
        "execute_model input_batch requests speculative_config",
        "serve/engine/label_logits.py",
    ),
    (
        "vllm.sampling_params.SamplingParams",
        "extra_args max_tokens logprobs prompt_logprobs structured_outputs",
        "serve/engine/label_logits.py",
    ),
)
TEXTS = (
    # function or class, text in its source, file that relies on it
    ("vllm.v1.engine.utils.CoreEngineProcManager.__init__", "get_mp_context()", "serve/engine/entry.py"),
    ("vllm.v1.engine.utils.launch_core_engines", "CoreEngineProcManager(", "serve/engine/entry.py"),
    ("vllm.v1.engine.core_client.MPClient", "launch_core_engines(", "serve/engine/entry.py"),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.bind_kv_cache_manager",
        "self._kv_cache_manager = ",
        "serve/engine/partial_prefix.py",
    ),
    ("vllm.entrypoints.openai.api_server", "if __name__ == '__main__'", "serve/launch/process.py"),
    ("vllm.entrypoints.pooling.factories.init_pooling_state", "state.serving_scores = ", "serve/engine/classifier.py"),
)
_FLAG = re.compile(r"--[a-z][a-z0-9-]*[a-z0-9]")
_VARIABLE = re.compile(r"VLLM_[A-Z0-9_]+")
_LAUNCH_FILES = ("plan.py", "parsers.py", "rerankers.py", "process.py")
_FLAG_FILES = (
    "vllm.engine.arg_utils",
    "vllm.entrypoints.common.cli_args",  # since 0.33
    "vllm.entrypoints.launchers.cli_args",
)
_DefinedIn = tuple[str, ast.AST]
"""A definition and its module."""


class Sources:
    """The sources of one vLLM: modules, the definitions in them and their members."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = cache(self._tree)

    def _tree(self, module: str) -> ast.Module | None:
        stem = self.root.joinpath(*module.split("."))
        file = next((one for one in (stem.with_suffix(".py"), stem / "__init__.py") if one.is_file()), None)
        return ast.parse(file.read_text(encoding="utf-8")) if file else None

    def find(self, path: str) -> _DefinedIn | None:
        """Return the definition of a dotted path: a module's function, class or name, or the member of a class."""
        parts = path.split(".")
        for length in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:length])
            if self.tree(module) is not None:
                found = self._defined(module, parts[length])
                for name in parts[length + 1 :]:
                    found = self.member(found, name) if found else None
                return found
        return None

    def _defined(self, module: str, name: str, depth: int = 0) -> _DefinedIn | None:
        tree = self.tree(module)
        if tree is None or depth > 8:
            return None
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        source = _absolute(module, node, self._is_package(module))
                        original = name if alias.name == "*" else alias.name
                        if found := self._defined(source, original, depth + 1):
                            return found
        for node in ast.walk(tree):  # names that a package loads lazily: {"LLM": ".entrypoints.llm:LLM"}
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name and isinstance(value, ast.Constant):
                        source, _, original = str(value.value).partition(":")
                        if original:
                            return self._defined(f"{module}{source}", original, depth + 1)
        submodule = self.tree(f"{module}.{name}")
        return (f"{module}.{name}", submodule) if submodule else None

    def _is_package(self, module: str) -> bool:
        return (self.root.joinpath(*module.split(".")) / "__init__.py").is_file()

    def member(self, owner: _DefinedIn, name: str) -> _DefinedIn | None:
        """Return the method or attribute of a class, looked up in its bases too."""
        for module, node in self._with_bases(owner):
            for one in ast.walk(node):
                is_method = isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and one.name == name
                if is_method or (isinstance(one, ast.Assign | ast.AnnAssign) and name in _targets(one)):
                    return module, one
        return None

    def _with_bases(self, owner: _DefinedIn, depth: int = 0) -> Iterator[_DefinedIn]:
        module, node = owner
        if not isinstance(node, ast.ClassDef) or depth > 8:
            return
        yield owner
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            found = self._defined(module, ast.unparse(name).split(".")[-1])
            if found:
                yield from self._with_bases(found, depth + 1)

    def refusal(self, found: _DefinedIn, num_positional: int, keywords: Sequence[str]) -> str | None:
        """Return why a definition does not take a call with these arguments, or None if it does."""
        node = found[1]
        if isinstance(node, ast.ClassDef):
            init = self.member(found, "__init__")
            if init and isinstance(init[1], ast.FunctionDef):
                return self.refusal((init[0], init[1]), num_positional, keywords)
            fields = {name for _, one in self._with_bases(found) for name in _fields(one)}
            unknown = [name for name in keywords if name not in fields]
            return f"has no field {unknown[0]}" if unknown else None
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        arguments = node.args
        decorators = {ast.unparse(one) for one in node.decorator_list}
        names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
        is_bound = bool(names) and names[0] in {"self", "cls"} and "staticmethod" not in decorators
        names = names[1:] if is_bound else names
        if num_positional > len(names) and arguments.vararg is None:
            return f"takes {len(names)} positional arguments, not {num_positional}"
        known = {*names[num_positional:], *(one.arg for one in arguments.kwonlyargs)}
        unknown = [name for name in keywords if name not in known and arguments.kwarg is None]
        if unknown:
            return f"takes no argument {unknown[0]}"
        required = names[num_positional : len(names) - len(arguments.defaults)]
        required += [
            one.arg for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None
        ]
        missing = [name for name in required if name not in keywords]
        return f"needs the argument {missing[0]}" if missing else None


def problems(root: Path) -> list[str]:
    """Return what the product uses and the vLLM under `root` (which holds the folder vllm) lacks."""
    sources = Sources(root)
    found: list[str] = []
    for file, paths, calls in _imports():
        path = next((one for one in paths if sources.find(one)), paths[0])
        definition = sources.find(path)
        if definition is None:
            found.append(f"{path} does not exist; {file} imports it")
            continue
        for num_positional, keywords in calls:
            if refusal := sources.refusal(definition, num_positional, keywords):
                found.append(f"{path} {refusal}; {file} calls it")
    for path, num_positional, names, user in METHODS:
        definition = sources.find(path)
        refusal = sources.refusal(definition, num_positional, names.split()) if definition else "does not exist"
        found += [f"{path} {refusal}; {user} calls it"] if refusal else []
    for path, names, user in ATTRIBUTES:
        owner = sources.find(path)
        found += [
            f"{path} has no {name}; {user} reads it"
            for name in names.split()
            if owner is None or sources.member(owner, name) is None
        ]
    for path, text, user in TEXTS:
        definition = sources.find(path)
        if definition is None or text not in ast.unparse(definition[1]):
            found.append(f"{path} no longer contains {text!r}; {user} relies on it")
    return [*found, *_missing_flags(sources), *_missing_variables(root), *_missing_parsers(sources)]


def _imports() -> Iterator[tuple[str, list[str], list[tuple[int, list[str]]]]]:
    """Yield a file, the places that it imports a name from, one for each version, and the arguments of its calls."""
    for file in sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls: dict[str, list[tuple[int, list[str]]]] = {}
        paths: dict[str, list[str]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                is_plain = not any(isinstance(one, ast.Starred) for one in node.args)
                names = [one.arg for one in node.keywords if one.arg is not None]
                if is_plain and len(names) == len(node.keywords):
                    calls.setdefault(node.func.id, []).append((len(node.args), names))
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    paths.setdefault(alias.asname or alias.name, []).append(f"{node.module}.{alias.name}")
        for name, places in paths.items():
            yield str(file.relative_to(ROOT)), places, calls.get(name, [])


def _constants(pattern: re.Pattern[str]) -> list[str]:
    """Return the texts of a pattern in the files that start vLLM."""
    trees = [ast.parse((ROOT / "serve" / "launch" / name).read_text(encoding="utf-8")) for name in _LAUNCH_FILES]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    return sorted(text for text in texts if isinstance(text, str) and pattern.fullmatch(text))


def _missing_flags(sources: Sources) -> list[str]:
    trees = [tree for name in _FLAG_FILES if (tree := sources.tree(name))]
    fields = {name for tree in trees for node in ast.walk(tree) for name in _fields(node)}
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}

    return [
        f"vLLM has no option {flag}; serve/launch passes it"
        for flag in _constants(_FLAG)
        if flag not in texts and flag[2:].replace("-", "_") not in fields
    ]


def _missing_variables(root: Path) -> list[str]:
    known = (root / "vllm" / "envs.py").read_text(encoding="utf-8")
    return [
        f"vLLM reads no variable {name}; serve/launch sets it"
        for name in _constants(_VARIABLE)
        if f'"{name}"' not in known
    ]


def _missing_parsers(sources: Sources) -> list[str]:
    missing = []
    for package, rules in (("vllm.reasoning", REASONING_RULES), ("vllm.tool_parsers", TOOL_RULES)):
        tree = sources.tree(package)
        keys = {
            key.value
            for node in ast.walk(tree or ast.Module([], []))
            if isinstance(node, ast.Dict)
            for key in node.keys
            if isinstance(key, ast.Constant)
        }
        missing += [f"{package} registers no {rule.parser}" for rule in rules if rule.parser not in keys]
    return missing


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a module, those in top-level if and try blocks included."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _statements(node)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    parts = [one for target in targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
    named = {one.id for one in parts if isinstance(one, ast.Name)}
    return named | {one.attr for one in parts if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "self"}


def _fields(node: ast.AST) -> set[str]:
    body = node.body if isinstance(node, ast.ClassDef) else []
    return {one.target.id for one in body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")[: None if is_package and node.level == 1 else (1 if is_package else 0) - node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def main() -> int:
    """Check the wheel or the folder that the command line names."""
    given = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        root = given
        if given.is_file():
            root = Path(folder)
            with zipfile.ZipFile(given) as wheel:
                wheel.extractall(root, [name for name in wheel.namelist() if name.endswith(".py")])
        found = problems(root)
    sys.stdout.write("\n".join(found or [f"{given.name}: everything that the product uses exists"]) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
