"""Objects that nobody would write, against the code that reads objects from anybody: ``make fuzz`` runs it."""
