"""Prepares models for the Hub: heads in one folder, checks of what is published, and cards.

`heads` keeps several heads beside one backbone. `privacy` finds and takes out what no one else may see. `publication`
gathers the files of a run that are published. `student_card` and `teacher_card` fill measured numbers into the texts
beside them. `card_words` has the words that both use.
"""
