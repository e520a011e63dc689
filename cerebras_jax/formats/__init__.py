"""Formats: pure functions between an optimizer's entries and other people's layouts."""
