"""Measure and judge: claims of others, results of servers, and what a judgment needs."""
