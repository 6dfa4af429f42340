"""Constrained DPO: the method, alone.

Nothing in this package imports Prefect, MLflow or boto3; it runs on a bare GPU box.
"""
