"""What stages hand on to those that come after."""

from pipeline.config import load_recipe
from pipeline.stages import load_options


def test_what_no_shape_tells_goes_with_the_weights() -> None:
    """Otherwise a network is judged and served by the published values."""
    options = {"conv_scale": 0.02, "img_range": 255.0, "num_heads": [2, 2]}
    recipe = load_recipe("demo", [f"model.options.{key}={value}" for key, value in options.items()])
    assert load_options(recipe) == options
