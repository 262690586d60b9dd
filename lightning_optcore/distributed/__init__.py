"""One model on many ranks: how they communicate, how they are watched, and what is done when one dies."""
