"""The closing words of a run and of a sweep, written from their result records alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cdpo_core.evaluation.cuts import cut_lines
from cdpo_core.evaluation.decoding import decoding_words
from cdpo_core.evaluation.result import cost_figures, tail_figures, verdict
from cdpo_core.evaluation.sweep_result import choice_words
from cdpo_core.plain_text import one_line
from tasks.environment import default_store
from tasks.report_words import percent

Record = Mapping[str, Any]
SHARES = ("unsafe_prompts", "over_refusal")


def print_result(result: Record, console: Console) -> None:
    """Methods × figures, the trajectory of λ, the scorers, the truth where it is known, the verdict, what is next."""
    console.print()
    console.print(_methods(result))
    console.print(_tails(result))
    if len(result["constraints"]) > 1:
        console.print(_constraints(result))
    if result["rounds"]:
        console.print(_rounds(result))
    lines = [*_scorers(result), *_responses(result), *_truth(result), *_price(result), *_work(result)]
    _print(console, "", *lines, "")
    style = "bold green" if result["status"] == "certified" else "bold yellow"
    console.print(verdict(result), style=style, soft_wrap=True)
    _print(console, *(f"  To do: {item['fix']}" for item in result.get("instrument") or []))
    _print(console, "", *_next(result))


def print_sweep(result: Record, console: Console) -> None:
    """The frontier as a table, what failed, and which policy was chosen."""
    varied = list(result["frontier"][0].get("settings") or {}) if result["frontier"] else []
    heads = ["status", "λ", "reward", "cost [95 %]", "bound", "true cost"]
    table = _table(f"Sweep: {len(result['frontier'])} experiments", "limit", *varied, *heads)
    for point in result["frontier"]:
        table.add_row(
            _number(point.get("limit"), "+.3g"),
            *(str(point["settings"][path]) for path in varied),
            str(point.get("status", "")).replace("_", " "),
            _number(point.get("lambda"), ".3g"),
            _mean(point.get("reward")),
            _interval(point.get("cost")),
            _number((point.get("certificate") or {}).get("upper")),
            _number(point.get("true_cost")),
        )
    console.print()
    console.print(table)
    failed = [f"Failed: {item['name']}: {item['error'].splitlines()[0]}" for item in result.get("failed") or []]
    chosen = result.get("chosen")
    _print(console, *failed, "", f"{choice_words(result)}.", *(_policy(chosen["policy"]) if chosen else []))
    _print(console, *_tracking(result), *_report(result))


def print_comparison(result: Record, console: Console) -> None:
    """The table of a comparison, one block a limit, and where its files are."""
    for limit in dict.fromkeys(row["limit_name"] for row in result["table"]):
        rows = [row for row in result["table"] if row["limit_name"] == limit]
        heads = ("kept", "reward", "r − βKL", "behind", "cost", "captured", "CPU s")
        table = _table(f"limit {limit} ({rows[0]['limit']:.2f})", "method", *heads)
        for row in rows:
            table.add_row(
                row["title"],
                f"{row['kept']}/{row['seeds']}",
                _mean(row["reward"]),
                _mean(row["objective"]),
                _mean(row["ahead_objective"]),
                _mean(row["cost"]),
                _mean(row["captured"]),
                f"{row['compute']['cpu_seconds']:.0f}",
            )
        console.print()
        console.print(table)
    _print(console, *_tracking(result), *_report(result))


def _methods(result: Record) -> Table:
    only = result["constraints"][0] if len(result["constraints"]) == 1 else None
    costs = cost_figures(result)
    # Several costs take the room of the interval's ends, and have their limits and λ in a table of their own.
    heads = ["cost [95 %]", "limit"] if only else [f"{name} ± 95 %" for name in costs]
    table = _table("Held-out test prompts", "method", "reward", *heads, "safe", "KL")
    for name, figures in _by_method(result).items():
        cells = [_interval(figures.get("cost")), f"{only['limit']:g}"] if only else []
        table.add_row(
            name,
            _mean(figures.get("reward")),
            *(cells or [_plus_minus(figures.get(key)) for key in costs.values()]),
            percent(figures.get("safe_rate")),
            _mean(figures.get("kl")),
        )
    return table


def _tails(result: Record) -> Table:
    heads = tail_figures(result)
    table = _table("Beyond the mean", "method", *heads)
    for name, figures in _by_method(result).items():
        table.add_row(name, *((percent if key in SHARES else _mean)(figures.get(key)) for key in heads.values()))
    return table


def _by_method(result: Record) -> dict[str, Record]:
    """Test figures by method: the baselines, then the returned policy."""
    rows = dict(result["baselines"])
    if result.get("test"):
        only = len(result["constraints"]) == 1
        rows[f"C-DPO (λ = {_lambda(result.get('lambda'))})" if only else "C-DPO"] = result["test"]
    return rows


def _constraints(result: Record) -> Table:
    is_known = any(item.get("true_cost") is not None for item in result["constraints"])
    table = _table("Limits", "cost", "limit", "λ", "mean", "bound", "holds", *["true cost"] * is_known)
    for item in result["constraints"]:
        certificate = item.get("certificate") or {}
        table.add_row(
            item["name"],
            f"{item['limit']:g}",
            _lambda(item.get("lambda")),
            _mean(item.get("cost")),
            _number(certificate.get("upper")),
            ("yes" if certificate["passed"] else "no") if certificate else "not tested",
            *[_number(item.get("true_cost"))] * is_known,
        )
    return table


def _rounds(result: Record) -> Table:
    table = _table("Rounds (selection prompts)", "round", "λ", "reward", "cost", "bound", "KL", "seconds")
    for item in result["rounds"]:
        table.add_row(
            str(item["round"]),
            _lambda(item["lambda"]),
            _mean(item["reward"]),
            _mean(item["cost"]),
            _number(item.get("cost_upper")),
            _mean(item.get("kl")),
            _number(item.get("seconds"), ".1f"),
        )
    return table


def _scorers(result: Record) -> list[str]:
    lines = []
    for name, report in (result.get("scorers") or {}).items():
        if report.get("accuracy") is None:
            lines.append(f"{name} model: {report.get('warning') or 'no held-out labels'}")
            continue
        line = f"{name} model: accuracy {report['accuracy']:.3f} [{report['low']:.3f}, {report['high']:.3f}]"
        line += f" on {report['pairs']} held-out pairs of {report['prompts']} prompts"
        if report.get("calibration_error") is not None:
            line += f"; where cost is 0 is known to ± {1.96 * report['calibration_error']:.2f}"
        if report["high"] < 0.5:
            line += " — it ranks against its labels: check the sign"
        elif report["low"] <= 0.5:
            line += " — no better than chance, as far as this interval tells"
        lines.append(line)
    return lines


def _responses(result: Record) -> list[str]:
    """How the certified responses were drawn, how many of each method's were cut, and the run's warnings."""
    decoding = (result.get("certificate") or {}).get("decoding")
    lines = [f"Responses: {decoding_words(decoding)}"] if decoding else []
    cut = {name: row.get("unfinished") for name, row in _by_method(result).items()}
    if shares := [f"{name} {percent(share)}" for name, share in cut.items() if share]:
        lines.append(f"Cut before they ended: {', '.join(shares)}")
    lines += cut_lines(result.get("cut") or {})
    return [*lines, *(f"warning: {text}" for text in result.get("warnings") or [])]


def _truth(result: Record) -> list[str]:
    oracle = result.get("oracle")
    if not oracle:
        return []
    costs, optimal_costs, lambdas = (
        [item.get(name) for item in result["constraints"]] if len(result["constraints"]) > 1 else oracle.get(name)
        for name in ("true_cost", "optimal_cost", "optimal_lambda")
    )
    best = (
        f"  the exact optimum: reward {_number(oracle.get('optimal_reward'))}, cost "
        f"{_number(optimal_costs)} at λ = {_lambda(lambdas)}"
    )
    limits = ", ".join(f"{item['limit']:g}" for item in result["constraints"])
    if oracle.get("captured") is None:
        return ["Truth, which only the testbed knows:", best]
    return [
        "Truth, which only the testbed knows:",
        f"  the policy: reward {_number(oracle['true_reward'])}, cost {_number(costs)} "
        f"(limit {limits}), {_number(oracle.get('support_mass'), '.1%')} on the grammar",
        best,
        f"  captured {oracle['captured']:.3f} of the possible gain; a certified policy could reach "
        f"{_number(oracle.get('captured_ceiling'), '.3f')}, one with these scorers "
        f"{_number(oracle.get('scorer_ceiling'), '.3f')}, and both together "
        f"{_number(oracle.get('certified_scorer_ceiling'), '.3f')}",
        *_proxy_gap(oracle.get("proxy_gap") or {}),
    ]


def _proxy_gap(gaps: Mapping[str, Any]) -> list[str]:
    """How much better the policy looks to the scorers than it is, beyond what the reference shows."""
    if not gaps:
        return []
    words = ", ".join(f"{name} {gap['gap']:+.3f}" for name, gap in gaps.items())
    return [f"  over-optimisation (scorers minus truth, policy against reference): {words}"]


def _price(result: Record) -> list[str]:
    """What a tighter limit would cost here (λ is the dual's slope), and how far limits can go at all."""
    reachable, lambda_ = result.get("reachable") or {}, result.get("lambda")
    if len(result["constraints"]) > 1 or lambda_ is None or reachable.get("floor") is None:
        return []
    return [
        f"Price of the limit: 0.1 lower costs about {0.1 * lambda_:.3f} of reward − β KL. By the reference's samples a "
        f"policy can have costs from {reachable['at_zero']:.2f} (λ = 0) down to {reachable['floor']:.2f}"
    ]


def _work(result: Record) -> list[str]:
    stages = result.get("stages") or []
    cached = sum(bool(stage["cached"]) for stage in stages)
    seconds = sum(stage["seconds"] for stage in stages if not stage["cached"])
    return [f"Stages: {cached} there already, {len(stages) - cached} computed in {seconds:.0f} s"]


def _next(result: Record) -> list[str]:
    return [*_tracking(result), *_policy(result.get("policy")), *_report(result)]


def _policy(policy: Any) -> list[str]:
    """Where the policy is, and the two commands for it, with as short a reference as they take."""
    if not policy:
        return []
    store, _, place = policy["uri"].removesuffix(".json").rpartition("/stages/")
    stage, _, key = place.partition("/")
    option = "" if store == default_store() else f" --store {store}"
    return [
        f"  Policy   {policy['uri']}",
        f'  Try it   cdpo sample {stage}/{key[:12]}{option} "PROMPT"',
        f"  Use it   cdpo export {stage}/{key[:12]}{option} DIR",
    ]


def _report(result: Record) -> list[str]:
    """Where the figures, the samples and the record are."""
    return [f"  Report   {result['report']}"] if result.get("report") else []


def _tracking(result: Record) -> list[str]:
    tracking = result.get("tracking") or {}
    uri, run = str(tracking.get("uri") or ""), tracking.get("run_id") or ""
    if not uri:
        return []
    kept = tracking.get("kept")
    words = f"           it was away: {kept} entries are kept in the store and are sent by the next run"
    away = [words] if kept else []
    if tracking.get("url") or uri.startswith("http"):
        return [f"  MLflow   {tracking.get('url') or uri} (run {run})", *away]
    return [f"  MLflow   cdpo up, or: mlflow ui --backend-store-uri {uri} (run {run})", *away]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for head in others:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(one_line(line), soft_wrap=True)


def _lambda(value: Any) -> str:
    return _number(value, ".3g")


def _mean(value: Any) -> str:
    return _number(value.get("mean") if isinstance(value, Mapping) else value)


def _interval(value: Any) -> str:
    if not isinstance(value, Mapping):
        return _number(value)
    return f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"


def _plus_minus(value: Any) -> str:
    if not isinstance(value, Mapping):
        return _number(value)
    return f"{_number(value['mean'])} ± {_number((value['high'] - value['low']) / 2)}"


def _number(value: Any, spec: str = ".2f") -> str:
    """A number, or one for each constraint."""
    if isinstance(value, (list, tuple)):
        return ", ".join(_number(item, spec) for item in value)
    return "–" if value is None else format(float(value), spec)
