"""Every event and API body of Headrace. Imports nothing of the other packages."""
