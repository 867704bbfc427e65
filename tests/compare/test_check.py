"""`slimserve check`: a good variant passes in stock transformers and stock vLLM; a broken one gets a reason."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from slimserve.compare.check import check_variant, deviations, reference_logprobs, tolerance
from slimserve.compress.build import build_variant
from slimserve.compress.formats import get_format
from slimserve.compress.recipe import Calibrate, Quantize, list_recipes, load_recipe
from slimserve.core.errors import UserError
from slimserve.serve.engine.offline import ask_vllm
from tests.conftest import needs_avx512

_SIZES = {
    "vocab_size": 331,
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "head_dim": 32,
}
_GQA = {"num_attention_heads": 6, "num_key_value_heads": 2}
_MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama-tied-gqa": LlamaConfig(**_SIZES, **_GQA, tie_word_embeddings=True),
    "llama-untied-mha": LlamaConfig(**_SIZES, **_MHA, tie_word_embeddings=False),
    "mistral": MistralConfig(**{**_SIZES, "hidden_size": 96, "intermediate_size": 160}, **_GQA, sliding_window=None),
    "qwen2-bias": Qwen2Config(**_SIZES, **_GQA, tie_word_embeddings=True),
    "qwen3-head-dim": Qwen3Config(**_SIZES, **_GQA),
}
INT8_HEADS = [(family, recipe) for family in ("llama-tied-gqa", "llama-untied-mha") for recipe in ("w8a8", "w4a16")]
INT8_HEAD = ("quantize.head=int8", "quantize.method=rtn", "quantize.scales=minmax")
REFUSED = {("mistral", "nf4"): "'96' are no multiple of 64"}
"""Combinations that bitsandbytes would decode wrongly; the other formats support these sizes."""
PROMPTS = [torch.randint(0, 331, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 23)]


class Built:
    """Variants of tiny random models, each built when it is first asked for."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._ids = folder / "ids.jsonl"
        tokens = torch.randint(0, 331, (8, 32), generator=torch.Generator().manual_seed(1))
        self._ids.write_text("\n".join(json.dumps({"input_ids": row}) for row in tokens.tolist()))

    def __call__(self, family: str, name: str, *settings: str) -> Path:
        """Return the variant of a shipped recipe with these settings; UserError if the model cannot have it."""
        target = self._folder / "-".join((family, name, *settings))
        if target.exists():
            return target
        _, recipe = load_recipe(name, ["prune.multiple=32", *settings] if "prune" in name else settings)
        if not settings:
            calibration = Calibrate(source=str(self._ids), num_samples=8, sequence_length=32)
            recipe = recipe.model_copy(update={"calibration": calibration})
        return build_variant(family, self._dense(family), name, recipe, target)

    def _dense(self, family: str) -> Path:
        directory = self._folder / family
        if not directory.exists():
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(FAMILIES[family])
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            model.to(torch.bfloat16).save_pretrained(directory)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(self._tokenizer / file, directory)
        return directory

    def all(self) -> dict[tuple[str, str], Path]:
        """Return every shipped recipe on every family, and the variants with an INT8 output layer."""
        variants = {}
        for family, name in itertools.product(FAMILIES, list_recipes()):
            _, recipe = load_recipe(name, [])
            if any(isinstance(step, Quantize) and get_format(step.format).needs_gpu for step in recipe.steps):
                continue  # tests/compress/test_gpu_formats.py has them
            if (family, name) in REFUSED:
                with pytest.raises(UserError, match=REFUSED[family, name]):
                    self(family, name)
            else:
                variants[family, name] = self(family, name)
        return variants | {(family, f"{name}-head"): self(family, name, *INT8_HEAD) for family, name in INT8_HEADS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Built:
    return Built(tmp_path_factory.mktemp("matrix"), smollm2)


@pytest.mark.engine
@needs_avx512
def test_every_recipe_on_every_family_computes_in_stock_vllm_what_it_should(built: Built, tmp_path: Path) -> None:
    variants = built.all()
    prompts = [prompt.tolist() for prompt in PROMPTS]
    answers = list(ask_vllm(list(variants.values()), prompts, 4, tmp_path / "vllm.log"))
    assert len(answers) == len(variants)
    problems = []
    for (family, recipe), answer in zip(variants, answers, strict=True):
        if answer.error:
            problems.append(f"{family} {recipe}: {answer.error}")
            continue
        off, noise = deviations(reference_logprobs(variants[family, recipe], PROMPTS), answer)
        if not off < tolerance(noise):
            problems.append(f"{family} {recipe}: log-probabilities differ by {off:.3f}, bf16 alone by {noise:.3f}")
    assert not problems, "\n".join(problems)


@pytest.mark.engine
@needs_avx512
def test_a_good_variant_passes(built: Built) -> None:
    findings = list(check_variant(built("llama-tied-gqa", "prune25-w8a8")))
    assert [finding.name for finding in findings] == ["shapes", "plain torch", "transformers", "vLLM", "greedy text"]
    assert all(finding.passed for finding in findings), findings


@pytest.mark.parametrize(("family", "recipe"), INT8_HEADS)
def test_an_int8_head_passes_what_needs_no_engine(built: Built, family: str, recipe: str) -> None:
    findings = check_variant(built(family, recipe, *INT8_HEAD))
    for what in ("shapes", "plain torch", "transformers"):
        finding = next(findings)
        assert (finding.name, finding.passed) == (what, True), finding


def test_a_shape_that_is_not_the_configs_is_named(built: Built, tmp_path: Path) -> None:
    broken = shutil.copytree(built("llama-tied-gqa", "prune25"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, broken / "model.safetensors", {"format": "pt"})
    (finding,) = check_variant(broken)
    assert not finding.passed
    assert finding.detail.startswith(f"{name}: (192, 127) in the file, (192, 128) according to the config")
