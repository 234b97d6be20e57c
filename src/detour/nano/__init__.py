"""Miniature models and a drawn dataset, so that everything can be tried and tested without a download."""
