//! Reading request bodies.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};

use super::ServerState;
use super::prompt::run_cpu;
use crate::openai::{ApiError, Body, NO_OPS, RefusedFields, Unknown};
use crate::record::RequestRecord;

/// A JSON body, parsed strictly. What nobody reads is logged.
pub(super) struct ApiJson<T>(pub(super) T);

impl<T: Body + Send + 'static> FromRequest<ServerState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &ServerState) -> Result<Self, ApiError> {
        let kind =
            request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
        let essence = kind.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
        // Other types can be sent by any web page without asking the browser's permission.
        if essence != "application/json" && !essence.ends_with("+json") {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "invalid_request_error",
                format!(
                    "The body must come with the header \"Content-Type: application/json\", found {kind:?}."
                ),
            ));
        }
        let id = request
            .extensions()
            .get::<std::sync::Arc<RequestRecord>>()
            .map_or_else(String::new, |record| record.id().to_owned());
        let limit = state.options().max_body_bytes;
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
                return ApiError {
                    code: Some("request_too_large"),
                    ..ApiError::new(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        "invalid_request_error",
                        format!("The request body is longer than this server's limit of {limit} bytes."),
                    )
                };
            }
            ApiError::bad_request(format!("The request body could not be read: {}.", rejection.body_text()))
        })?;
        run_cpu(bytes.len(), move || {
            let mut unknown = Unknown::default();
            let value = T::parse(&bytes, &mut unknown)?;
            let ignored: Vec<&str> =
                unknown.paths().filter(|path| !NO_OPS.contains(path) && !RefusedFields::knows(path)).collect();
            if !ignored.is_empty() {
                tracing::info!(request_id = id, fields = ?ignored, "ignored fields that this server does not know");
            }
            Ok(Self(value))
        })
        .await
    }
}
