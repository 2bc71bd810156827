"""What a run is: the YAML a user writes, as types that say what is wrong with it."""

from kvgraft.recipe.load import load_recipe
from kvgraft.recipe.recipe import Recipe
from kvgraft.recipe.sections import (
    AlignmentRecipe,
    Arm,
    ColumnsRecipe,
    Combination,
    ContinuationRecipe,
    DataRecipe,
    FitRecipe,
    GraftRecipe,
    KVLossRecipe,
    LogitLossRecipe,
    LoraRecipe,
    Objective,
    ProjectorRecipe,
    StoreRecipe,
    StudentRecipe,
    TeacherRecipe,
    TrainingRecipe,
)

__all__ = [
    "AlignmentRecipe",
    "Arm",
    "ColumnsRecipe",
    "Combination",
    "ContinuationRecipe",
    "DataRecipe",
    "FitRecipe",
    "GraftRecipe",
    "KVLossRecipe",
    "LogitLossRecipe",
    "LoraRecipe",
    "Objective",
    "ProjectorRecipe",
    "Recipe",
    "StoreRecipe",
    "StudentRecipe",
    "TeacherRecipe",
    "TrainingRecipe",
    "load_recipe",
]
