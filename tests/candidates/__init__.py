"""Candidates for `loracle verify`: what everybody's tools make of a base and adapter, and what goes wrong."""
