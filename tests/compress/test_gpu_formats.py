"""Tests of the formats for GPUs and of the FP8 KV cache on built variants: transformers and vLLM's parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from slimserve.compress.build import build_variant
from slimserve.compress.formats import format_names, get_format
from slimserve.compress.formats.kv_cache import KeyValuePeaks, KeyValueRounding
from slimserve.compress.inspect import describe_variant
from slimserve.compress.recipe import Calibrate, Prune, Quantize, Recipe
from slimserve.compress.reference import reference_logits, reference_shapes
from slimserve.core.errors import UserError
from slimserve.core.variant import read_manifest

from .conftest import INPUT_IDS, TinyModel, ids_file, logits, make_tiny, weight_bytes

GPU_FORMATS = [name for name in format_names() if get_format(name).needs_gpu]
PRUNE = Prune(step="prune", mlp_remove_frac=1 / 3, multiple=128, method="peak_magnitude")
SCALES = {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([0.25])}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model whose sizes are multiples of 128, as FP8 blocks need them.

    compressed-tensors 0.17 takes the single column of blocks of a layer with 128 inputs for scales per channel.
    """
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return make_tiny(config, tmp_path_factory.mktemp("wide") / "dense")


@pytest.fixture(scope="module")
def variants(wide: TinyModel) -> dict[str, Path]:
    """Pruned variants in every GPU format, each with an FP8 KV cache."""
    calibration = Calibrate(source=ids_file(wide.directory.parent), num_samples=6, sequence_length=16)
    built = {}
    for name in GPU_FORMATS:
        steps = (PRUNE, Quantize(step="quantize", format=name, kv_cache="fp8_e4m3"))
        recipe = Recipe(summary="", calibration=calibration, steps=steps)
        built[name] = build_variant("tiny", wide.directory, name, recipe, wide.directory.parent / name)
    return built


def with_cache_scheme(variant: Path, folder: Path, changes: dict[str, str] | None) -> Path:
    """Return a copy of the variant in `folder` with changes of the cache's scheme; None removes the scheme."""
    config = json.loads((variant / "config.json").read_text())
    if changes is None:
        del config["quantization_config"]["kv_cache_scheme"]
    else:
        config["quantization_config"]["kv_cache_scheme"] |= changes
    for file in variant.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.usefixtures("uncompiled_fp4")
@pytest.mark.parametrize("name", GPU_FORMATS)
def test_every_layer_computes_in_transformers_what_the_format_says(name: str, variants: dict[str, Path]) -> None:
    quant_format = get_format(name)
    # In bfloat16 the library would round the float32 scales of 8-bit formats; 4-bit floats it unpacks to bfloat16 only.
    dtype = torch.bfloat16 if quant_format.num_bits == 4 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(variants[name], dtype=dtype)
    logits(model)  # the first call unpacks the weights
    torch.nn.Module.float(model)
    described = json.loads((variants[name] / "config.json").read_text())["quantization_config"]
    stored = load_file(variants[name] / "model.safetensors")
    layers = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    del layers["lm_head"]
    assert len(layers) == 7
    for path, module in layers.items():
        tensors = {key.removeprefix(f"{path}."): one for key, one in stored.items() if key.startswith(f"{path}.")}
        weight_OI = quant_format.unpack(tensors, described)
        weight_OI = weight_OI.bfloat16().float() if quant_format.num_bits == 4 else weight_OI
        assert torch.equal(module.weight, weight_OI), path
        x = torch.randn(1, 5, module.in_features, generator=torch.Generator().manual_seed(4))
        expected = torch.nn.functional.linear(quant_format.round_inputs(x, tensors), weight_OI)
        with torch.no_grad():
            off = (module(x) - expected).abs().max() / expected.abs().max()
        # The library divides the peak of INT8 inputs by 127.5 instead of 127.
        assert off < (0.02 if name == "w4a8" else 1e-5), path


@pytest.mark.parametrize("name", GPU_FORMATS)
def test_manifest_sizes_and_inspect_state_the_format(name: str, wide: TinyModel, variants: dict[str, Path]) -> None:
    text = "\n".join(describe_variant(variants[name]))
    assert f"format {name}, method rtn" in text
    assert "kv cache fp8" in text
    assert f"{name}: " in text
    manifest = read_manifest(variants[name])
    assert manifest is not None
    assert manifest.steps[1].detail["group_size"] == get_format(name).make_grid().group_size  # type: ignore[union-attr]
    shapes = reference_shapes(variants[name])
    layers = [shape for tensor, shape in shapes.items() if ".layers." in tensor and len(shape) == 2]
    quantized = sum(get_format(name).layer_bytes(outputs, inputs, None, True) for outputs, inputs in layers)
    dense = sum(2 * torch.Size(shape).numel() for shape in shapes.values() if shape not in layers)
    cache_scales, shape_tensors = 8, 16 * len(layers) if name.startswith("w4a8") else 0
    assert weight_bytes(variants[name]) == quantized + dense + cache_scales + shape_tensors


@pytest.mark.parametrize("name", GPU_FORMATS)
def test_the_config_describes_an_fp8_cache_as_the_library_does(name: str, variants: dict[str, Path]) -> None:
    described = json.loads((variants[name] / "config.json").read_text())["quantization_config"]
    expected = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    assert QuantizationConfig.model_validate(described).kv_cache_scheme == expected


def test_scales_of_the_cache_are_those_of_the_calibrated_keys_and_values(
    wide: TinyModel, variants: dict[str, Path]
) -> None:
    """Compare with the cache that transformers fills; pruning leaves the inputs of the first attention as they are."""
    peaks: dict[str, float] = {"k_scale": 0.0, "v_scale": 0.0}
    for line in (wide.directory.parent / "ids.jsonl").read_text().splitlines():
        with torch.no_grad():
            cache = wide.model(torch.tensor([json.loads(line)["input_ids"]])).past_key_values
        for name, tensor in (("k_scale", cache.layers[0].keys), ("v_scale", cache.layers[0].values)):
            peaks[name] = max(peaks[name], float(tensor.abs().max()))
    tensors = load_file(variants["fp8-block"] / "model.safetensors")
    for name, peak in peaks.items():
        scale = tensors[f"model.layers.0.self_attn.{name}"]
        assert (scale.shape, scale.dtype) == ((1,), torch.float32)
        # The variant's keys and values come from FP8 weights.
        assert float(scale) == pytest.approx(peak / 448, rel=0.05)


def test_keys_and_values_are_read_back_as_fp8_times_the_scale() -> None:
    key, value = torch.tensor([[[[1.0, 17.6, 1e9, -0.5]]]]), torch.tensor([[[[4.3, -0.25, 0.0, 200.0]]]])
    rounded_key, rounded_value = KeyValueRounding(SCALES)(key, value)
    assert torch.equal(rounded_key, torch.tensor([[[[1.0, 18.0, 224.0, -0.5]]]]))
    assert torch.equal(rounded_value, torch.tensor([[[[4.5, -0.25, 0.0, 112.0]]]]))


def test_peaks_are_those_of_all_batches_and_map_to_448() -> None:
    peaks = KeyValuePeaks()
    for key, value in (
        (torch.tensor([-448.0, 1.0]), torch.tensor([3.0])),
        (torch.tensor([2.0]), torch.tensor([-56.0])),
    ):
        assert peaks(key, value) == (key, value)
    assert peaks.tensors() == {"k_scale": torch.tensor([1.0]), "v_scale": torch.tensor([0.125])}
    assert KeyValuePeaks().tensors()["k_scale"] == 1.0


def test_a_cache_in_fp8_changes_the_reference(wide: TinyModel, variants: dict[str, Path], tmp_path: Path) -> None:
    with_cache_scheme(variants["nvfp4"], tmp_path, None)
    without, with_cache = (next(iter(reference_logits(one, [INPUT_IDS[0]]))) for one in (tmp_path, variants["nvfp4"]))
    assert 0 < (without - with_cache).abs().mean() < (without - logits(wide.model)[0]).abs().mean()


def test_other_caches_are_not_read(variants: dict[str, Path], tmp_path: Path) -> None:
    with_cache_scheme(variants["nvfp4"], tmp_path, {"strategy": "attn_head"})
    with pytest.raises(UserError, match="kv_cache_scheme strategy: 'attn_head'"):
        list(reference_logits(tmp_path, [INPUT_IDS[0]]))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nvfp4", "inputs of self_attn.q_proj: '24' are no multiple of 16"),
        ("mxfp4a16", "inputs of self_attn.q_proj: '24' are no multiple of 32"),
        ("w4a8-fp8", "inputs of self_attn.q_proj: '24' are no multiple of 128"),
        ("fp8-block", "inputs of self_attn.q_proj: '24' are no multiple of 128"),
    ],
)
def test_a_build_refuses_impossible_sizes_before_any_work(
    name: str, problem: str, tiny_llama: TinyModel, tmp_path: Path
) -> None:
    recipe = Recipe(summary="", steps=(Quantize(step="quantize", format=name),))
    with pytest.raises(UserError, match=problem):
        build_variant("tiny", tiny_llama.directory, name, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bitsandbytes_has_no_fp8_cache() -> None:
    with pytest.raises(ValueError, match="kv_cache = fp8_e4m3 is not possible beside nf4"):
        Quantize(step="quantize", format="nf4", kv_cache="fp8_e4m3")


ASK_VLLM = """
import json, sys
from types import SimpleNamespace
from unittest.mock import MagicMock, patch
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig, CompressedTensorsKVCacheMethod)
from vllm.model_executor.model_loader.weight_utils import maybe_remap_kv_scale_name
package = schemes.__name__ + ".compressed_tensors_"
stubs = ["w4a4_nvfp4.init_nvfp4_linear_kernel", "w4a4_nvfp4.expose_input_quant_key",
         "w4a4_mxfp4.init_mxfp4_linear_kernel", "w8a8_fp8.init_fp8_linear_kernel", "w8a8_fp8.expose_input_quant_key",
         "w4a8_fp8.choose_mp_linear_kernel", "wNa8.choose_mp_linear_kernel"]
def kernel(*args, **kwargs):
    return MagicMock(__name__="stub")
def scheme_of(described):
    config = CompressedTensorsConfig.from_config(described)
    parts = config.target_scheme_map["Linear"]
    return config._get_scheme_from_parts(parts["weights"], parts["input_activations"], format=parts["format"])
def create(scheme, sizes, inputs):
    layer = torch.nn.Module()
    layer.tp_size = 1
    scheme.create_weights(layer=layer, input_size=inputs, input_size_per_partition=inputs, output_size=sum(sizes),
        output_partition_sizes=sizes, params_dtype=torch.bfloat16, weight_loader=lambda *args: None)
    return {name: [str(value.dtype), list(value.shape)] for name, value in layer.named_parameters()}
answers = {}
for name, described in json.load(sys.stdin).items():
    answer = answers[name] = {"refusal": ""}
    CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(described["kv_cache_scheme"])
    with set_current_vllm_config(VllmConfig()):
        model_config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
        with (patch("vllm.model_executor.parameter.get_tensor_model_parallel_rank", return_value=0),
              patch("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", return_value=1),
              patch("vllm.distributed.get_tensor_model_parallel_world_size", return_value=1),
              patch(package + "w8a8_fp8.get_current_vllm_config", return_value=model_config)):
            try:
                create(scheme_of(json.loads(json.dumps(described))), [256, 128, 128], 256)
            except Exception as error:
                answer["refusal"] = f"{type(error).__name__}: {error}"
            for stub in stubs:
                patch(package + stub, side_effect=kernel).start()
            with patch.object(CompressedTensorsConfig, "_check_scheme_supported", return_value=True):
                scheme = scheme_of(described)
            patch.stopall()
            for stub in stubs:
                patch(package + stub, side_effect=kernel).start()
            answer |= {"scheme": type(scheme).__name__, "capability": scheme.get_min_capability(),
                       "parameters": create(scheme, [256, 128, 128], 256)}
            patch.stopall()
remapped = maybe_remap_kv_scale_name("model.layers.0.self_attn.k_scale", {"model.layers.0.self_attn.attn.k_scale": 0})
print("RESULT" + json.dumps({"answers": answers, "remapped": remapped}))
"""
SCHEMES = {
    "fp8-block": ("CompressedTensorsW8A8Fp8", 89),
    "w4a8": ("CompressedTensorsWNA8Int", 75),
    "w4a8-fp8": ("CompressedTensorsW4A8Fp8", 90),
    "nvfp4": ("CompressedTensorsW4A4Fp4", 75),
    "nvfp4a16": ("CompressedTensorsW4A4Fp4", 75),
    "mxfp4": ("CompressedTensorsW4A4Mxfp4", 80),
    "mxfp4a16": ("CompressedTensorsW4A4Mxfp4", 80),
}


def stacked(parts: list[Tensor], suffix: str) -> list[object]:
    """Return dtype and shape of the parameter in which vLLM gathers the tensors of fused layers."""
    shape = list(parts[0].shape)
    if suffix != "weight_shape":
        shape[0] = sum(len(part) for part in parts)
    return [str(parts[0].dtype), shape]


def test_vllm_takes_the_tensors_of_every_format_up_to_its_check_of_the_platform(variants: dict[str, Path]) -> None:
    """The kernels are stubs: this shows scheme, names, dtypes and shapes, and that a CPU alone is the obstacle."""
    pytest.importorskip("vllm")
    configs = {
        name: json.loads((variant / "config.json").read_text())["quantization_config"]
        for name, variant in variants.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK_VLLM], input=json.dumps(configs), capture_output=True, text=True, timeout=600
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT"))
    assert result["remapped"] == "model.layers.0.self_attn.attn.k_scale"
    for name, answer in result["answers"].items():
        assert (answer["scheme"], answer["capability"]) == SCHEMES[name], name
        tensors = load_file(variants[name] / "model.safetensors")
        prefixes = [f"model.layers.0.self_attn.{layer}." for layer in ("q_proj", "k_proj", "v_proj")]
        suffixes = [key.removeprefix(prefixes[0]) for key in tensors if key.startswith(prefixes[0])]
        ours = {suffix: stacked([tensors[prefix + suffix] for prefix in prefixes], suffix) for suffix in suffixes}
        assert answer["parameters"] == ours, name
        if name not in {"fp8-block", "w4a8"}:  # a CPU with AMX has a kernel for the first, w4a16's serves the second
            assert answer["refusal"], name
