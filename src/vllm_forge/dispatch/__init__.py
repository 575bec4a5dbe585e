"""Runs work in images on the nodes of a cluster, and collects what it wrote."""
