"""Where state lives: keys, tenants and the audit log; each store is chosen by URL."""
