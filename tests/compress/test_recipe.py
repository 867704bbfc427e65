from pathlib import Path

import pytest

from slimserve.compress.recipe import Prune, Quantize, list_recipes, load_recipe
from slimserve.core.errors import UserError


def test_shipped_recipes_have_the_steps_that_their_names_say() -> None:
    recipes = {name: load_recipe(name)[1] for name in list_recipes()}
    assert {"dense", "w8a8", "prune25", "prune25-w8a8"} <= set(recipes)
    assert recipes["dense"].steps == ()
    assert [type(step) for step in recipes["prune25-w8a8"].steps] == [Prune, Quantize]
    assert {name: recipe.summary for name, recipe in recipes.items()} == list_recipes()


def test_a_recipe_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "half.toml"
    file.write_text('summary = "half"\n[[steps]]\nstep = "prune"\nmlp_remove_frac = 0.5\nmultiple = 8\n')
    name, recipe = load_recipe(str(file))
    assert name == "half"
    assert recipe.steps == (Prune(step="prune", mlp_remove_frac=0.5, multiple=8),)


def test_workloads_replace_the_calibration_source_unless_the_recipe_names_one() -> None:
    recipe = load_recipe("w8a8")[1]
    assert recipe.calibration.source == "self-generated"
    assert recipe.calibrated_on(["reasoning", "own.toml"]).calibration.source == "reasoning,own.toml"
    assert recipe.calibrated_on([]) == recipe
    for source in ("mixed", "self-generated"):
        own = load_recipe("w8a8", [f"calibration.source={source}"])[1]
        assert own.calibrated_on(["reasoning"]) == own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("summary = ", "own.toml' cannot be read"),
        ("steps = []", "recipe key summary: .*field required"),
        ('summary = "x"\nmood = 1', "recipe key mood: '1' is invalid: extra inputs are not permitted"),
        ('summary = "x"\n[[steps]]\nstep = "fold"', "recipe key steps.0: .*prune.*quantize"),
        ('summary = "x"\n[[steps]]\nstep = "prune"\nmlp_remove_frac = 1.5', "mlp_remove_frac: '1.5' is invalid"),
        ('summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "w1a1"', "format: 'w1a1' is invalid"),
        (
            'summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "w8a8"\n'
            '[[steps]]\nstep = "prune"\nmlp_remove_frac = 0.5',
            "quantize must be the last step",
        ),
        ('summary = "x"\n[[steps]]\nstep = "prune"', "give mlp_remove_frac, kv_remove_frac or both"),
        (
            'summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "w4a16"\ngroup_size = 48',
            "group_size: '48' is invalid",
        ),
        (
            'summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "nf4"\nmethod = "gptq"',
            "leave out method",
        ),
        (
            'summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "w4a16"\nsmoothquant = 0.5',
            "smoothquant needs",
        ),
        (
            'summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "w8a8"\nawq = true',
            "awq needs a format that keeps activations",
        ),
        ('summary = "x"\n[calibration]\nnum_samples = 0', "calibration.num_samples: '0' is invalid"),
    ],
)
def test_an_invalid_file_is_rejected_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="recipe: 'w9' is unknown; choose from dense, fp8, fp8-block, int8-bnb, "):
        load_recipe("w9")


def test_settings_change_single_keys() -> None:
    _, recipe = load_recipe("prune25-w8a8", ["prune.mlp_remove_frac=0.5", "quantize.method=rtn", "calibration.seed=3"])
    prune, quantize = recipe.steps
    assert isinstance(prune, Prune)
    assert isinstance(quantize, Quantize)
    assert (prune.mlp_remove_frac, quantize.method, recipe.calibration.seed) == (0.5, "rtn", 3)


@pytest.mark.parametrize("setting", ["seed=3", "quantize.method", "prune_depth.num_blocks=2"])
def test_a_setting_that_matches_no_table_lists_the_tables(setting: str) -> None:
    with pytest.raises(UserError, match=r"--set: .*tables: calibration, prune, quantize"):
        load_recipe("prune25-w8a8", [setting])


def test_a_setting_of_an_unknown_key_is_rejected() -> None:
    with pytest.raises(UserError, match="recipe key steps.0.quantize.colour"):
        load_recipe("w8a8", ["quantize.colour=blue"])
