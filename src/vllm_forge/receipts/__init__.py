"""Receipts of the GPU suite: made, kept in ``records/receipts``, and verified on any host."""

FOLDER = "records/receipts"
