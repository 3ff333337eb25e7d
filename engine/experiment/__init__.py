"""A whole experiment: edit, measure, again, and sum up; `rewire run` calls it. One file a step:

names (published ones), wrong (what is said of wrong input), config (what is asked for), data (its facts and texts),
results and summary and plots (what is written), progress (what of it is there), run.
"""
