"""The agent: what runs inside the sandbox and carries out its requests.  Standard library only, import-light."""
