"""Errors of a plan, each with a stable code."""

from __future__ import annotations

from embferry.protocol.errors import EmbferryError


class PlanError(EmbferryError):
    """Base of the errors of a plan."""

    code = "plan_error"
    http_status = 400


class ModelUnknown(PlanError):
    """The model's files do not say how many tokens a picture has. Name a directory with config.json."""

    code = "plan_model_unknown"


class WorkloadInvalid(PlanError):
    """The workload is impossible, or too large to play through. The message names the option."""

    code = "plan_workload_invalid"


class RateNotCarried(PlanError):
    """No arrangement of the devices carries the rate. The message says how many devices or cores would."""

    code = "plan_rate_not_carried"


class GoalNotMet(PlanError):
    """No number of devices meets the goal. The message says which time the best of them has."""

    code = "plan_goal_not_met"


class SpeedsMissing(PlanError):
    """Nothing says how fast the stages are. Give a file, measure a deployment, or name the speeds."""

    code = "plan_speeds_missing"


class SpeedsInvalid(PlanError):
    """The file of speeds cannot be read, or has an impossible value."""

    code = "plan_speeds_invalid"


class ResultsInvalid(PlanError):
    """The results to compare with cannot be read, or no run in them can be predicted."""

    code = "plan_results_invalid"


class MeasuringFailed(PlanError):
    """A deployment that is to be measured does not answer as it should."""

    code = "plan_measuring_failed"
    http_status = 502
    default_retryable = True
