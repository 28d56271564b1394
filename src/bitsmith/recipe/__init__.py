"""A recipe: the YAML description of one job, and `run`, which does the whole of it."""

from bitsmith.recipe.job import run
from bitsmith.recipe.load import load_recipe, parse_recipe
from bitsmith.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "parse_recipe", "run"]
