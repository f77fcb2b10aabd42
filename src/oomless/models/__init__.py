"""From a name, a folder or a config.json to a Hugging Face model that trains here, and back to files."""
