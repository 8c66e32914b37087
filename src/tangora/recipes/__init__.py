"""Named methods: an initialization, an optimizer, a PEFT configuration and a grid of learning rates."""

from tangora.recipes.rank_search import RankSearch
from tangora.recipes.recipe import Recipe
from tangora.recipes.table import recipe, recipes

__all__ = ["RankSearch", "Recipe", "recipe", "recipes"]
