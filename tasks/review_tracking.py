"""What the tracker does for a reader's sake: data sets, an alias in the model registry, saved views.

As everything of the tracker, each may be repeated without harm, and is kept while MLflow is away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tasks.tracking import TRAINING_UI, Tracker, _tracked


class ReviewTracker(Tracker):
    """The tracker, with what makes a run readable in MLflow's UI."""

    @_tracked(None)
    def log_datasets(self, run_id: str, datasets: Sequence[Mapping[str, str]]) -> None:
        """Name the data a run read.

        Args:
            run_id: of the run.
            datasets: records {name, digest, source, source_type, profile, context}; source and profile are JSON.
        """
        self._submit(run_id, "datasets", datasets=[dict(item) for item in datasets])

    @_tracked(None)
    def point_alias(
        self, run_id: str, name: str, alias: str, tags: Mapping[str, str], child: str = "", digest: str = ""
    ) -> None:
        """Let an alias of a registered model name the version of one run's policy; without one, remove the alias.

        Args:
            run_id: the sweep's run, which chose.
            name: the registered model.
            alias: moved if it names another version.
            tags: set on that version; an alias is only removed from a version that carries them.
            child: the run that found the policy; "" for none.
            digest: of the policy.
        """
        call = {"name": name, "alias": alias, "child": child, "digest": digest, "tags": dict(tags)}
        # The version may be among what is kept, of the child's own process.
        if self.deliver():
            self._keep(run_id, "alias", call)
        else:
            self._submit(run_id, "alias", **call)

    @_tracked(None)
    def tag_experiment(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of the whole experiment (its description, saved views) that are not there yet."""
        self._submit(run_id, "experiment_tags", experiment_id=self._experiment_id, tags=dict(tags))

    def view_page(self, key: str) -> str:
        """The page of a saved view (`tasks.review_views`) within MLflow's UI."""
        return f"#/experiments/{self._experiment_id}/runs?viewStateShareKey={key}&compareRunsMode=CHART&{TRAINING_UI}"
