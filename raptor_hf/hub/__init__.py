"""Models on the Hub: several heads in one folder, what may be published, and the cards.

`heads`: heads beside one backbone. `student_card`, `teacher_card`: README.md from measured numbers. `card_words`: the
words that both use.
"""
