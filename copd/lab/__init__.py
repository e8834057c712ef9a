"""The method shown and studied on a small machine: synthetic tasks, a tiny model and its warm start, study, report.

It stands on the loop (`copd`) as a user's own program would; nothing there imports it but the command line.
"""
