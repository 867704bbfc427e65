import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme

from compress.formats import FORMATS, pack_layer, quantization_config
from compress.quantize import relative_error, round_to_nearest

SHAPES = [(3, 7), (1, 1), (64, 33), (5, 576)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_bits", [8, 4])
def test_every_weight_goes_to_the_nearest_point_of_its_rows_grid(shape: tuple[int, int], num_bits: int) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(shape)
    quantized = round_to_nearest(weight_OI, num_bits)
    grid = torch.arange(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1)).float()
    for row in range(shape[0]):
        points = grid * quantized.scale_O1[row]
        nearest = (weight_OI[row][:, None] - points[None, :]).abs().min(dim=1).values
        chosen = (weight_OI[row] - quantized.dequantize()[row]).abs()
        torch.testing.assert_close(chosen, nearest, atol=1e-6, rtol=0)


def test_the_largest_weight_of_a_row_is_kept() -> None:
    weight_OI = torch.tensor([[0.1, -3.0, 1.0], [0.0, 0.02, 0.01]])
    dequantized = round_to_nearest(weight_OI, 8).dequantize()
    assert dequantized[0, 1] == pytest.approx(-3.0, rel=1e-6)
    assert dequantized[1, 1] == pytest.approx(0.02, rel=1e-6)


def test_a_row_of_zeros_stays_zero() -> None:
    quantized = round_to_nearest(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), 8)
    assert quantized.integers_OI[0].tolist() == [0, 0]
    assert torch.isfinite(quantized.scale_O1).all()
    assert relative_error(torch.zeros(2, 2), round_to_nearest(torch.zeros(2, 2), 8)) == 0.0


def test_a_matrix_on_the_grid_comes_back_exactly() -> None:
    integers = torch.tensor([[127.0, -5.0, 0.0], [-127.0, 3.0, 88.0]])
    weight_OI = integers * torch.tensor([[0.5], [0.25]])
    assert torch.equal(round_to_nearest(weight_OI, 8).dequantize(), weight_OI)


@pytest.mark.parametrize("shape", SHAPES)
def test_compressed_tensors_reads_the_packed_layer_as_we_do(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    quantized = round_to_nearest(torch.randn(shape), 8)
    scheme = preset_name_to_scheme(FORMATS["w8a8"].preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(FORMATS["w8a8"].layout)
    decompressed = compressor.decompress(pack_layer(quantized), scheme)
    torch.testing.assert_close(decompressed["weight"], quantized.dequantize())


def test_the_config_says_what_stock_loaders_look_for() -> None:
    config = quantization_config("w8a8", ["lm_head"])
    group = config["config_groups"]["group_0"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "int-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    assert (group["input_activations"]["dynamic"], group["input_activations"]["strategy"]) == (True, "token")
