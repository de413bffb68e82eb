{{- define "hydra-llm.name" -}}
{{- $own := contains "hydra-llm" .Release.Name -}}
{{- $own | ternary .Release.Name (printf "%s-hydra-llm" .Release.Name) | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "hydra-llm.selector" -}}
app.kubernetes.io/name: hydra-llm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "hydra-llm.labels" -}}
{{ include "hydra-llm.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What a container of the gateway and of the migration have in common. */}}
{{- define "hydra-llm.container" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
env:
  - {name: HYDRA_ADMIN_KEY_FILE, value: /run/secrets/hydra-llm/admin_key}
  - {name: OPENAI_API_KEY_FILE, value: /run/secrets/hydra-llm/openai_api_key}
  - {name: PGPASSWORD_FILE, value: /run/secrets/hydra-llm/database_password}
  {{- range $name, $value := .Values.settings }}
  - name: HYDRA_SERVE_{{ upper $name }}
    value: {{ $value | toString | quote }}
  {{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
volumeMounts:
  - {name: secrets, mountPath: /run/secrets/hydra-llm, readOnly: true}
  - {name: data, mountPath: /data}
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "hydra-llm.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: secrets
    secret:
      secretName: {{ .Values.existingSecret }}
      defaultMode: 0440
  - name: data
    emptyDir: {sizeLimit: {{ .Values.cacheSize }}}
  - name: tmp
    emptyDir: {sizeLimit: 256Mi}
  {{- if .Values.bundle.existingClaim }}
  - name: bundles
    persistentVolumeClaim: {claimName: {{ .Values.bundle.existingClaim }}, readOnly: true}
  {{- end }}
{{- end }}
