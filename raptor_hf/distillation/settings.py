"""The settings of a distillation, which are declared in raptor_settings, where they load in a moment."""

from raptor_settings.distill import DistillSettings

__all__ = ["DistillSettings"]
