"""Kubernetes: what a trainer does there beside training, and what a user does with a cluster.

The package ``kubernetes`` is imported where it is used: nothing here is needed on one machine.
"""
