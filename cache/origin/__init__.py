"""Where the DICOM objects are: the systems of record, how a series is found in them, and how they fail."""
