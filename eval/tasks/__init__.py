"""Offline tasks in lmms-eval's own YAML format: easy-VQA and the scenes of :mod:`vtc.pocket.scenes`, without a download.

The folder is what ``lmms-eval --include_path`` wants (``vtc tasks --path`` prints it). A task's YAML names a line of
``recipes.jsonl``; :func:`vtc.eval.tasks.utils.load_questions` makes the questions from it, and the images are drawn when asked for.
"""
