"""Flows whose parameters are the config's sections: one signature, said once.

Prefect makes a flow's form from its signature and docstring. Both are put together here from the config's fields, so
that every flow that takes a config has the same parameters with the same words.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

from prefect import tags
from pydantic import Field

from cdpo_core.config import ConstraintConfig, ExperimentConfig
from tasks.environment import RUN_TAG

# The rules that Prefect's server checks before anything starts; those within a section are the section's own.
RULES: dict[str, Any] = {
    "name": Annotated[str, Field(min_length=1, max_length=100)],
    "seed": Annotated[int, Field(ge=0)],
    "constraints": Annotated[list[ConstraintConfig], Field(min_length=1)],
}
# In the order of the form: what a user sets first comes first.
WORDS = {
    "name": "Name shown in the UIs (1 to 100 characters).",
    "constraints": "The limits on harm, each with its cost model (at least one). Must be given.",
    "data": "The preferences, and how their prompts are split.",
    "policy": "The language model that is aligned.",
    "seed": "Seed of every random stream. At least 0.",
    "dpo": "One round of training.",
    "dual": "How lambda moves from round to round.",
    "certificate": "The test the returned policy must pass.",
    "sampling": "Numbers of responses drawn for each prompt.",
    "sft": "Fine-tuning that makes the reference policy.",
    "reward": "The model of what is better.",
    "evaluation": "What is measured besides.",
    "testbed": "The oracle world, used when data.source is `testbed`.",
    "compute": "The machine; in float32 it changes no result but by rounding.",
    "store": "Where artifacts are kept.",
    "tracking": "MLflow.",
}


def takes_sections(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (config, its own keyword parameters) as one of its own parameters and the config's sections.

    The docstring's last section must be `Args:`; the sections' words are added to it.
    """
    own = dict(list(inspect.signature(function).parameters.items())[1:])
    hints = typing.get_type_hints(function, include_extras=True)

    @wraps(function)
    def call(**given: Any) -> Any:
        mine = {name: given[name] for name in own if name in given}
        sections = {name: value for name, value in given.items() if name not in own}
        # Nested runs do not inherit a run's tags, only the tags around the call.
        with tags(RUN_TAG):
            return function(ExperimentConfig(**sections), **mine)

    parameters = [
        item.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]) for name, item in own.items()
    ]
    for name in WORDS:
        annotation = RULES.get(name, ExperimentConfig.model_fields[name].annotation)
        field = ExperimentConfig.model_fields[name]
        # The server refuses a run without what has no default, which is the limits: none is made up.
        default = inspect.Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    # What Prefect reads the form from.
    call.__signature__ = inspect.Signature(parameters, return_annotation=hints["return"])  # type: ignore[attr-defined]
    call.__annotations__ = {item.name: item.annotation for item in parameters} | {"return": hints["return"]}
    lines = [f"    {name}: {words}" for name, words in WORDS.items()]
    head = inspect.cleandoc(function.__doc__ or "")
    call.__doc__ = "\n".join([head if "Args:" in head else f"{head}\n\nArgs:", *lines])
    del call.__wrapped__
    return call
