"""The report of an experiment for people: one HTML file with its figures inside and nothing from elsewhere.

Its bytes follow from the result record alone: no time of writing, no path or address of a machine. Whatever a model
wrote is escaped, and a content policy in the page forbids scripts.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cdpo_core.evaluation.cuts import cut_lines
from cdpo_core.evaluation.decoding import decoding_words
from cdpo_core.evaluation.result import each, mean_figures, spending_in_words, tail_figures, tested_on
from cdpo_core.plain_text import visible
from tasks.report_words import explained, headline, interval, limits_of_meaning, meanings, percent, signed

if TYPE_CHECKING:
    import pandas as pd

    from cdpo_core.config import ExperimentConfig

Record = Mapping[str, Any]
Table = dict[str, Any]

SHARES = ("unfinished", "safe_rate", "unsafe_prompts", "over_refusal")
FIGURES = {
    "lambda_trajectory": "The price λ of harm in each round, and the mean cost it led to, against the limit",
    "reward_and_cost": "Reward and cost: the reference, DPO without a limit, and each round",
    "cost_histogram": "Costs of single answers, by method",
    "predicted_cost": "The cost predicted at each λ before training, and what the trained policies had",
    "price_of_limits": "The reward predicted at each limit",
}
# What names a machine and no result.
CIRCUMSTANCES = {"name", "store", "tracking", "compute"}


def experiment_report(
    result: Record, config: ExperimentConfig, figures: Sequence[Path], samples: pd.DataFrame | None = None
) -> str:
    """The report's HTML.

    Args:
        result: the result record.
        config: shown whole, without what names a machine.
        figures: PNG files, put in.
        samples: the samples table, or None.
    """
    ours = _ours(result)
    return page("experiment.html").render(
        title=result["name"],
        status=result["status"],
        headline=headline(result),
        words=explained(result),
        warnings=_warnings(result),
        lengths=cut_lines(result.get("cut") or {}),
        means=meanings(result),
        means_not=limits_of_meaning(result),
        certificates=_certificates(result),
        methods=_methods(result, mean_figures(result)) | {"ours": ours},
        tails=_methods(result, tail_figures(result)) | {"ours": ours},
        rounds=_rounds(result),
        figures=inlined(figures),
        samples=_samples(samples, result),
        scorers=_scorers(result),
        truth=_truth(result),
        provenance=provenance(result),
        config=yaml.safe_dump(
            config.model_dump(mode="json", exclude=CIRCUMSTANCES), sort_keys=False, allow_unicode=True
        ),
    )


def page(name: str) -> Any:
    """A template of tasks/templates; all that goes into it is escaped."""
    loader = PackageLoader("tasks", "templates")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """Control characters of plain text are shown as escapes; what a macro made is HTML already."""
    return visible(value) if type(value) is str else value


def inlined(files: Sequence[Path], titles: Mapping[str, str] = FIGURES) -> list[dict[str, str]]:
    """Figures as data, in the titles' order; with several constraints the others' follow the first one's."""
    found = []
    for stem, title in titles.items():
        for file in sorted(files):
            if file.stem == stem or file.stem.startswith(f"{stem}_"):
                suffix = file.stem[len(stem) + 1 :]
                content = base64.b64encode(file.read_bytes()).decode()
                found.append(
                    {"title": f"{title} ({suffix})" if suffix else title, "source": f"data:image/png;base64,{content}"}
                )
    return found


def short_reference(ref: Record | None) -> str:
    """`stage/key` of an artifact, which `cdpo sample` and `cdpo export` take, without its store's address."""
    if not ref:
        return "–"
    stage, key = ref["uri"].removesuffix(".json").split("/")[-2:]
    return f"{stage}/{key}"


def provenance(result: Record) -> list[tuple[str, str]]:
    """What a policy comes from: references and digests, seed, versions."""
    rows = [("seed", str(result["seed"]))]
    for name, label in (("policy", "policy"), ("data", "data"), ("pool_scores", "scores of the pool")):
        if ref := result.get(name):
            rows += [(label, short_reference(ref)), (f"{label}: sha256", ref["digest"])]
    rows += [
        (f"certificate rests on: {ref['kind']}", short_reference(ref))
        for ref in (result["certificate"] or {}).get("evidence", [])
    ]
    rows += [("computed by", _machine(item)) for item in result.get("machines", [])]
    return [*rows, ("this record was written by", _versions(result["versions"]))]


def _machine(item: Record) -> str:
    """One machine's line: how many stages, on what, with which libraries."""
    told = [f"{item['threads']} threads" if item.get("threads") else "", item.get("dtype", "")]
    if item.get("micro_batch"):
        told.append(f"micro-batch {item['micro_batch']}")
    where = ", ".join(filter(None, [item.get("device", ""), *told, _versions(item["versions"])]))
    count = len(item["stages"])
    return f"{where} ({count} stage{'s' if count > 1 else ''})"


def _versions(versions: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (), ours: str = "") -> Table:
    """What the templates' tables take."""
    return {"heads": list(heads), "rows": [list(row) for row in rows], "notes": list(notes), "ours": ours}


def _ours(result: Record) -> str:
    return f"C-DPO (λ = {signed([item['lambda'] for item in result['constraints']], 'g')})" if result["test"] else ""


def _warnings(result: Record) -> list[str]:
    notes = [(item["certificate"] or {}).get("note") for item in result["constraints"]]
    scorers = [report.get("warning") for report in (result["scorers"] or {}).values()]
    failed = [f"{item['what']}. {item['fix']}." for item in result.get("instrument", [])]
    return [*failed, *result.get("warnings", []), *filter(None, [*notes, *scorers])]


def _certificates(result: Record) -> Table:
    heads = ["cost", "limit", "mean", "upper bound", "δ", "test", "prompts", "times used", "kept"]
    rows = []
    for item in result["constraints"]:
        row = [item["name"], signed(item["limit"], "g")]
        certificate = item["certificate"]
        if certificate is None:
            rows.append([*row, *["–"] * 6, "not tested"])
            continue
        row += [signed(certificate[key], ".3f") for key in ("mean", "upper")]
        row += [
            f"{certificate['delta']:.3g}",
            certificate["method"],
            tested_on(certificate).replace(" held-out prompts", ""),
        ]
        rows.append([*row, str(certificate.get("spent") or "–"), "shown" if certificate["passed"] else "not shown"])
    aims = ", ".join(signed(item["target"], ".3f") for item in result["constraints"])
    note = (
        "δ is the probability that a policy which breaks the limit passes all the same. Training aimed at "
        f"{aims}, below the limit, so that a good policy passes. “Times used” counts the tests these held-out prompts "
        "had served when this was written."
    )
    certificate = result["certificate"] or {}
    decoding = certificate.get("decoding")
    said = [spending_in_words(certificate)]
    said += [f"It is about responses drawn at {decoding_words(decoding)}."] if decoding else []
    return table(heads, rows, [note, *filter(None, said)])


def _methods(result: Record, heads: Mapping[str, str]) -> Table:
    rows = {**result["baselines"], **({_ours(result): result["test"]} if result["test"] else {})}

    def cell(key: str, figure: Any) -> str:
        return percent(figure) if key in SHARES else interval(figure)

    body = [[name, *(cell(key, figures.get(key)) for key in heads.values())] for name, figures in rows.items()]
    return table(["method", *heads], body)


def _rounds(result: Record) -> Table:
    rows = [
        [
            str(item["round"]),
            signed(each(item["lambda"]), ".3g"),
            *(signed(each(item[key])) for key in ("reward", "cost", "cost_upper")),
            percent(item.get("safe_rate")),
            signed(item["kl"]),
        ]
        for item in result["rounds"]
    ]
    heads = ["round", "λ", "reward", "cost", "bound", "safe", "KL (nats)"]
    return table(heads, rows, ours=str(result.get("chosen_round") or ""))


def _samples(samples: pd.DataFrame | None, result: Record) -> Table:
    if samples is None:
        return {"heads": [], "rows": [], "text": []}
    costs = [item["name"] for item in result["constraints"]]
    columns = {"prompt": "prompt"}
    for side in ("reference", "policy"):
        columns |= {f"{side}_response": f"{side}'s answer", f"{side}_reward": "reward"}
        columns |= {f"{side}_cost_{name}": "cost" if len(costs) == 1 else name for name in costs}
    rows = [
        [str(row[name]) if name == "prompt" or name.endswith("_response") else signed(row[name]) for name in columns]
        for row in samples.to_dict("records")
    ]
    text = [at for at, name in enumerate(columns) if name == "prompt" or name.endswith("_response")]
    return {"heads": list(columns.values()), "rows": rows, "text": text}


def _scorers(result: Record) -> Table:
    rows, notes = [], []
    for name, report in (result["scorers"] or {}).items():
        if report.get("accuracy") is None:
            rows.append([f"{name} model", "–", "–", "–"])
            continue
        accuracy = f"{100 * report['accuracy']:.1f} % [{100 * report['low']:.1f}, {100 * report['high']:.1f}]"
        error = report.get("calibration_error")
        known = "–" if error is None else f"± {1.96 * error:.2f}"
        rows.append([f"{name} model", accuracy, f"{report['pairs']} of {report['prompts']} prompts", known])
        if error is not None:
            notes.append(
                f"The bound on {name} is in the cost model's units. Where the labels put its zero, the border of safe, "
                f"is known to {known} (95 %): so far could the bound be off for that reason alone."
            )
    return table(["", "ranks held-out pairs rightly", "pairs", "zero of cost known to"], rows, notes)


def _truth(result: Record) -> Table:
    oracle = result["oracle"]
    if not oracle:
        return table([], [])
    rows = [
        [
            "the exact optimum at this limit",
            signed(oracle.get("optimal_reward")),
            signed(oracle.get("optimal_costs")),
            signed(oracle.get("optimal_lambdas"), ".3g"),
        ]
    ]
    notes = []
    if oracle.get("captured") is not None:
        rows.append(
            ["the policy", signed(oracle["true_reward"]), signed(oracle["true_costs"]), signed(result["lambda"], ".3g")]
        )
        notes.append(
            f"The policy captures {100 * oracle['captured']:.1f} % of what the exact optimum gains over the reference; "
            f"with the certificate's margin {_in_percent(oracle['captured_ceiling'])} could be captured. "
            f"{100 * oracle['support_mass']:.1f} % of its answers are on the grammar. No decision reads any of this."
        )
    return table(["", "true reward", "true cost", "λ"], rows, notes)


def _in_percent(share: float | None) -> str:
    """A share to a tenth of a percent; where the target lies below the floor, nothing could be captured at it."""
    return "nothing" if share is None else f"{100 * share:.1f} %"
