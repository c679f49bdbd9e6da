"""Keys have a ceiling for the priority of their requests."""

import sqlalchemy as sa
from alembic import op

revision = "keys_0002"
down_revision = "keys_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("keys", sa.Column("priority", sa.String(16), nullable=False, server_default="default"))
