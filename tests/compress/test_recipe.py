from pathlib import Path

import pytest

from compress.recipe import PruneMlp, Quantize, list_recipes, load_recipe
from contracts.errors import UserError


def test_shipped_recipes_are_what_their_names_say() -> None:
    recipes = list_recipes()
    assert {"dense", "w8a8", "prune25", "prune25-w8a8"} <= set(recipes)
    assert recipes["dense"].steps == ()
    assert [type(step) for step in recipes["prune25-w8a8"].steps] == [PruneMlp, Quantize]


def test_a_file_is_a_recipe_too(tmp_path: Path) -> None:
    file = tmp_path / "half.toml"
    file.write_text('summary = "half"\n[[steps]]\nstep = "prune_mlp"\nremove_frac = 0.5\nmultiple = 8\n')
    name, recipe = load_recipe(str(file))
    assert name == "half"
    assert recipe.steps == (PruneMlp(step="prune_mlp", remove_frac=0.5, multiple=8),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("summary = ", "is not TOML"),
        ("steps = []", "recipe key summary: .*Field required"),
        ('summary = "x"\nmood = 1', "recipe key mood: '1' is refused: Extra inputs are not permitted"),
        ('summary = "x"\n[[steps]]\nstep = "fold"', "recipe key steps.0: .*prune_mlp.*quantize"),
        ('summary = "x"\n[[steps]]\nstep = "prune_mlp"\nremove_frac = 1.5', "remove_frac: '1.5' is refused"),
        ('summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "w1a1"', "format: 'w1a1' is refused"),
        (
            'summary = "x"\n[[steps]]\nstep = "quantize"\nformat = "w8a8"\n'
            '[[steps]]\nstep = "prune_mlp"\nremove_frac = 0.5',
            "quantize must be the last step",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="recipe: 'w9' is unknown; choose from dense, prune25, prune25-w8a8, w8a8"):
        load_recipe("w9")
