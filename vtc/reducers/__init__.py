"""One method per file. The registry imports every module of this folder; nothing else needs to know they exist."""
