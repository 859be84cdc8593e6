"""Models on the Hub: several heads in one folder, what may be published, and the cards.

`heads`: heads beside one backbone. `privacy`: what no one else may see. `publication`: what of a run is published.
`student_card`, `teacher_card`: README.md from measured numbers, each filled into the text beside it. `card_words`: the
words that both use.
"""
