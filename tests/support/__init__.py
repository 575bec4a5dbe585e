"""What several unit test modules need: an index server, wheel and archive makers, git trees."""
