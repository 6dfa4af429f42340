"""The `cdpo` command line.

What a command needs is imported when it runs, so that help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from cdpo_core.errors import InputError
from cdpo_core.plain_text import indented, one_line
from flows.begin import begin
from flows.command_line import (
    ANY_LIMIT,
    EXAMPLES,
    FIELDS,
    AtOnce,
    Config,
    Json,
    Limit,
    Name,
    Overrides,
    Seed,
    StoreUri,
    check_writable,
    default_to_nothing,
    split_tokens,
    write_json,
)
from flows.store import store as store_commands
from flows.terminal import PlainConsole, print_error, showing_progress
from flows.up_command import up
from tasks.environment import quiet_environment

if TYPE_CHECKING:
    from cdpo_core.config import ExperimentConfig

DONE, FAILED, BAD_INPUT, NOT_CERTIFIED, INTERRUPTED = 0, 1, 2, 3, 130

app = App(
    name="cdpo",
    help="Constrained DPO: a language model, preferences and a limit on harm in, a certified policy out.",
    help_format="plaintext",
    version=lambda: _version(),
    help_epilogue=EXAMPLES,
    usage="Usage: cdpo COMMAND [ARGUMENTS] [--SECTION.FIELD VALUE …]",
)


app.command(store_commands)
app.command(up, sort_key=9, help_epilogue="")


@app.command(sort_key=1, help_epilogue=FIELDS)
def run(
    config: Config,
    /,
    *,
    limit: Limit = None,
    seed: Seed = None,
    store: StoreUri = None,
    name: Name = None,
    json: Json = None,
    overrides: Overrides = None,
) -> int:
    """Run one experiment, from data to a certified policy.

    What a former run finished is not computed again: the same command continues a run that was stopped.
    """
    given = {**(overrides or {}), **_shortcuts(limit, seed, store, name)}
    experiment = _load(config, given, json)
    with showing_progress() as progress:
        progress("checks", 0, 1)
        log_file = begin("run")
        from flows.preflight import check_before_run

        check_before_run(experiment, serve=True)
        from flows.experiment import run_experiment

        progress("checks", 1, 1)
        result = run_experiment(experiment, progress=progress)
    if json is not None:
        write_json(json, result)
    from flows.closing_report import print_result

    print_result(result, _stdout())
    _stdout().print(f"  Log      {log_file}", soft_wrap=True)
    return DONE if result["status"] == "certified" else NOT_CERTIFIED


@app.command(sort_key=2, help_epilogue=FIELDS)
def plan(
    config: Config,
    /,
    *,
    limit: Limit = None,
    seed: Seed = None,
    store: StoreUri = None,
    json: Json = None,
    overrides: Overrides = None,
) -> int:
    """Show what a run would compute, and its margin.

    Lists the stages with what is there already, a rough time, and the margin that training keeps from the limit.
    """
    given = {**(overrides or {}), **_shortcuts(limit, seed, store)}
    experiment = _load(config, given, json)
    begin("plan")
    from flows.plan import plan_experiment
    from flows.plan_report import print_plan

    found = plan_experiment(experiment)
    if json is not None:
        write_json(json, found)
    print_plan(found, experiment, _stdout())
    return DONE


@app.command(sort_key=3, help_epilogue=FIELDS)
def sweep(
    config: Config,
    /,
    *,
    limits: Annotated[
        str, Parameter(help="Limits of the first constraint: a,b,c.", allow_leading_hyphen=True, metavar="A,B,C")
    ],
    seeds: Annotated[str, Parameter(help="Seeds, all limits for each: 0,1,2.", metavar="N,N,N")] = "",
    set_: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            negative="",
            help="A field's values, all limits for each: dpo.beta=0.25,0.5.",
            metavar="FIELD=A,B",
        ),
    ] = None,
    conditional: Annotated[
        bool, Parameter(negative="", help="Train one policy that is told lambda, for all limits (dpo.conditional).")
    ] = False,
    at_once: AtOnce = None,
    store: StoreUri = None,
    name: Name = None,
    json: Json = None,
    overrides: Overrides = None,
) -> int:
    """Run one experiment for each of several limits.

    Stages they share are computed once; the result is the frontier of reward over cost.
    """
    from flows.grid import combinations, parse_limits, parse_seeds

    numbers, all_seeds, vary = parse_limits(limits), parse_seeds(seeds) if seeds else [], set_ or []
    chosen = {**(overrides or {}), **({"dpo.conditional": "true"} if conditional else {})}
    experiment = _load(config, {**chosen, **_shortcuts(None, None, store, name)}, json, limit=min(numbers))
    varied = combinations(experiment, all_seeds, vary)
    with showing_progress() as progress:
        progress("checks", 0, 1)
        begin("sweep")
        from flows.preflight import check_before_run

        for item in varied:
            check_before_run(item.config, serve=True)
        from flows.closing_report import print_sweep
        from flows.sweep import ChildrenFailed, run_sweep

        progress("checks", 1, 1)
        failure = None
        try:
            result = run_sweep(experiment, numbers, all_seeds, vary, at_once=at_once, progress=progress)
        except ChildrenFailed as error:
            failure, result = error, error.result
    if json is not None:
        write_json(json, result)
    print_sweep(result, _stdout())
    if failure is not None:
        raise failure
    return DONE if result["chosen"] else NOT_CERTIFIED


@app.command(sort_key=4, help_epilogue=FIELDS)
def compare(
    config: Config,
    /,
    *,
    limits: Annotated[
        str, Parameter(help="Limits: numbers, or on the testbed names.", allow_leading_hyphen=True, metavar="A,B,C")
    ] = "loose,middle,tight",
    seeds: Annotated[str, Parameter(help="Worlds and random streams, one comparison each.", metavar="N,N,N")] = "0",
    methods: Annotated[str, Parameter(help="Methods, all if not given: ours,safe_rlhf,…", metavar="NAME,…")] = "",
    store: StoreUri = None,
    name: Name = None,
    json: Json = None,
    overrides: Overrides = None,
) -> int:
    """Run this method beside its rivals, each with its best settings.

    On the same prepared artifacts, limits and seeds; the result is a table and a figure of reward over cost.
    """
    from cdpo_core.methods import load_methods
    from flows.grid import entries, parse_seeds

    given = {**(overrides or {}), **_shortcuts(None, None, store, name)}
    experiment = _load(config, given, json, limit=ANY_LIMIT)
    numbers = parse_seeds(seeds)
    chosen = [method.name for method in load_methods(entries(methods, "--methods") if methods else [])]
    with showing_progress() as progress:
        progress("checks", 0, 1)
        begin("compare")
        from flows.preflight import check_before_run

        check_before_run(experiment, serve=True)
        from flows.closing_report import print_comparison
        from flows.compare import run_compare

        progress("checks", 1, 1)
        result = run_compare(experiment, entries(limits, "--limits"), numbers, chosen, progress=progress)
    if json is not None:
        write_json(json, result)
    print_comparison(result, _stdout())
    return DONE


@app.command(name="check-data", sort_key=5, help_epilogue=FIELDS)
def check_data(
    file: Annotated[str, Parameter(help="File, folder or hub id.")], /, *, overrides: Overrides = None
) -> int:
    """Check a data set and show what it holds."""
    experiment = _load("", {**(overrides or {}), "data.source": file}, limit=ANY_LIMIT)
    from cdpo_core.data.lengths import length_lines
    from cdpo_core.data.prepare import check_source, prepare
    from cdpo_core.data.sources import locate

    prepared = None if experiment.on_testbed else prepare(locate(experiment.data), experiment)
    report = check_source(experiment, prepared)
    for line in replace(report, notes=(*report.notes, *length_lines(experiment, prepared))).lines():
        _stdout().print(one_line(line), soft_wrap=True)
    return DONE


@app.command(sort_key=6, help_epilogue="")
def export(
    ref: Annotated[str, Parameter(help="The policy's reference, as `cdpo run` prints it.")],
    folder: Annotated[Path, Parameter(name="DIR", help="Folder to make.")],
    /,
    *,
    store: StoreUri = None,
) -> int:
    """Write a policy as a Hugging Face folder with a model card."""
    from flows.export import export_policy

    result = export_policy(ref, folder, store or "")
    status = result["status"].replace("_", " ") if result else "from no finished run: it carries no certificate"
    _stdout().print(f"Written to {folder} ({status}).", soft_wrap=True)
    return DONE


@app.command(sort_key=7, help_epilogue="")
def sample(
    policy: Annotated[str, Parameter(help="A policy's reference, or a Hugging Face folder or hub id.")],
    *prompts: Annotated[str, Parameter(help="Prompts to answer.")],
    number: Annotated[int, Parameter(name=["--number", "-n"], help="Responses to each prompt.")] = 3,
    seed: Annotated[int, Parameter(help="Seed of the draw.")] = 0,
    temperature: Annotated[
        float | None, Parameter(help="Temperature of the draw; that of the policy's test, else 1.")
    ] = None,
    store: StoreUri = None,
    overrides: Overrides = None,
) -> int:
    """Draw responses from a policy."""
    from flows.sampling import open_drawer

    if not prompts or number < 1 or not (temperature is None or temperature > 0):
        raise InputError(
            "sampling needs a prompt, a number of at least 1 and a positive temperature",
            where="cdpo sample",
            fix='for example: cdpo sample REF "PROMPT" --number 3',
        )
    chosen = [path.removeprefix("policy.") for path in overrides or {} if path.startswith("policy.")]
    drawer = open_drawer(policy, temperature, _load("", overrides or {}, limit=ANY_LIMIT).policy, chosen, store or "")
    for line in drawer.said:
        PlainConsole(stderr=True).print(one_line(line), soft_wrap=True)
    for prompt, responses in drawer.draw(prompts, number, seed):
        _stdout().print(indented(prompt), style="bold", soft_wrap=True)
        for response in responses:
            _stdout().print(f"  {indented(response)}", soft_wrap=True)
    return DONE


@app.command(sort_key=10, help_epilogue="")
def doctor(
    config: Annotated[str, Parameter(help="YAML file or preset.")] = "testbed", *, overrides: Overrides = None
) -> int:
    """Look at what is installed, reachable, writable."""
    from flows.doctor import examine
    from flows.up import join_running

    join_running()
    findings = examine(_load(config, overrides or {}, limit=ANY_LIMIT))
    for finding in findings:
        sign = "✗" if finding.fix else "✓"
        _stdout().print(one_line(f"{sign} {finding.what:<13} {finding.found}"), soft_wrap=True)
        if finding.fix:
            _stdout().print(one_line(f"  fix:          {finding.fix}"), soft_wrap=True)
    return FAILED if any(finding.fix for finding in findings) else DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    tokens: list[str] = []
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        quiet_environment(make_home=False)
        tokens, overrides = split_tokens(sys.argv[1:] if arguments is None else arguments)
        command, bound, left = app.parse_args(tokens, exit_on_error=False, print_error=False)
        return _call(command, bound.args, bound.kwargs, overrides, takes_overrides="overrides" in left)
    except CycloptsError as error:
        known = tokens and tokens[0] in list(app)
        fix = f"cdpo {tokens[0]} --help" if known else "cdpo --help"
        return print_error(InputError(str(error).rstrip("."), where="command line", fix=fix), debug=debug)
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept, and the same command continues from there", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return default_to_nothing()
    except Exception as error:
        return print_error(error, debug=debug)


def _call(
    command: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    overrides: dict[str, str],
    *,
    takes_overrides: bool,
) -> int:
    if overrides and not takes_overrides:
        raise InputError(
            "this command has no config to set a field of",
            where=f"command line: --{next(iter(overrides))}",
            fix="leave it out; `cdpo --help` lists the commands",
        )
    return int(command(*args, **kwargs, **({"overrides": overrides} if takes_overrides else {})) or DONE)


def _shortcuts(limit: str | None, seed: str | None, store: str | None, name: str | None = None) -> dict[str, str]:
    paths = {"constraints.0.limit": limit, "seed": seed, "store.uri": store, "name": name}
    return {path: value for path, value in paths.items() if value is not None}


def _load(
    config: str, overrides: Mapping[str, str], json: Path | None = None, *, limit: float | None = None
) -> ExperimentConfig:
    from cdpo_core.config_loading import load_config

    if json is not None:
        check_writable(json, "--json")
    return load_config(config, overrides, limit=limit)


def _version() -> str:
    try:
        return version("cdpo")
    except PackageNotFoundError:
        return "not installed"


def _stdout() -> PlainConsole:
    return PlainConsole()


if __name__ == "__main__":
    sys.exit(main())
